"""The exporter's rules for what changes nothing, made exact: it takes a small number for 0, and what is near 1 for 1.

So what keeps a divisor off 0 (``x / (y + 1e-9)``) would be dropped, and the program divide by 0 where the model does
not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules.common import _no_op

_SLOW_RULE = "SlicesSplit"
"""A rule that is quadratic in the number of nodes."""
_FOLDING_RULES = "FuseBatchNorm"
"""Rules that compute weights of others."""
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NEUTRAL_PATTERNS: tuple[tuple[Callable[..., Any], bool], ...] = (
    (lambda op, x: op.Mul(x, _exact_constant(1)), True),
    (lambda op, x: op.Add(x, _exact_constant(0)), True),
    (lambda op, x: op.Sub(x, _exact_constant(0)), False),
    (lambda op, x: op.Div(x, _exact_constant(1)), False),
)
"""What is x again, and whether its operands may change places."""


def default_rules() -> list[pattern.RewriteRule]:
    """The exporter's own rules, without those that are slow or not exact."""
    inexact = {id(rule) for rule in _no_op.rules}
    kept = [rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != _SLOW_RULE and id(rule) not in inexact]
    return [_skip_half_precision(rule) if str(rule.name).startswith(_FOLDING_RULES) else rule for rule in kept]


def _skip_half_precision(rule: pattern.RewriteRule) -> pattern.RewriteRule:
    """The rule, not tried in half precision: NumPy rounds at every step there, or answers in float32."""
    own = rule.try_rewrite

    def try_rewrite(model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **options: Any) -> Any:
        lacking = any(value is not None and value.dtype in _HALF for value in node.inputs)
        return None if lacking else own(model, graph, node, **options)

    made = copy.copy(rule)
    made.try_rewrite = try_rewrite  # type: ignore[method-assign, assignment]  # of this copy alone
    return made


def exact_no_op_rules() -> Iterator[pattern.RewriteRule]:
    """The rules left out for not being exact, exact."""
    for made, commutes in _NEUTRAL_PATTERNS:
        rule = pattern.RewriteRule(made, _no_op.identity)
        yield from rule.commute() if commutes else [rule]
    yield from (_no_op.dropout_zero_rule, _no_op.dropout_inference_rule)


def _exact_constant(value: int) -> Any:
    return pattern.Constant(value, rel_tol=0.0, abs_tol=0.0)
