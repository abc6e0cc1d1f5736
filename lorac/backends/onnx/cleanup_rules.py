"""The exporter's rules that remove ops without effect, made exact.

The exporter treats a small number as 0, and a number near 1 as 1. It would remove ``1e-9`` from ``x / (y + 1e-9)``, and
the program would divide by 0 where the model does not.
"""

import copy
from collections.abc import Callable, Iterator

import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import pattern
from onnxscript.rewriter.rules.common import _no_op

_SLOW_RULE = "SlicesSplit"
"""A rule that is quadratic in the number of nodes."""
_FOLDING_RULES = "FuseBatchNorm"
"""Rules that compute weights from others."""
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_NEUTRAL_PATTERNS: tuple[tuple[Callable[..., object], bool], ...] = (
    (lambda op, x: op.Mul(x, _exact_constant(1)), True),
    (lambda op, x: op.Add(x, _exact_constant(0)), True),
    (lambda op, x: op.Sub(x, _exact_constant(0)), False),
    (lambda op, x: op.Div(x, _exact_constant(1)), False),
)
"""Patterns that return x itself, each with whether its operands may change places."""


def default_rules() -> list[pattern.RewriteRule]:
    """Return copies of the exporter's rules, without the slow and the inexact ones."""
    inexact = {id(rule) for rule in _no_op.rules}
    exact = (rule for rule in rewriter._DEFAULT_REWRITE_RULES if rule.name != _SLOW_RULE and id(rule) not in inexact)
    rules = map(_copy_rule, exact)
    return [_skip_half_precision(rule) if str(rule.name).startswith(_FOLDING_RULES) else rule for rule in rules]


def _copy_rule(rule: pattern.RewriteRule) -> pattern.RewriteRule:
    """Return a copy of a rule with a new matcher, since a matcher references its last graph with all weights."""
    copied = copy.copy(rule)
    copied._matcher = type(rule._matcher)(rule._target_pattern)
    return copied


def _skip_half_precision(rule: pattern.RewriteRule) -> pattern.RewriteRule:
    """Return a rule that skips half precision, in which NumPy rounds at every step or computes in float32."""
    copied = copy.copy(rule)

    def try_rewrite(model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **options: object) -> object:
        is_half = any(value is not None and value.dtype in _HALF for value in node.inputs)
        return None if is_half else rule.try_rewrite(model, graph, node, **options)  # type: ignore[arg-type]  # passed on

    copied.try_rewrite = try_rewrite  # type: ignore[method-assign, assignment]  # of this copy alone
    return copied


def exact_no_op_rules() -> Iterator[pattern.RewriteRule]:
    """Return new exact rules, which replace the inexact ones."""
    for target, commutes in _NEUTRAL_PATTERNS:
        rule = pattern.RewriteRule(target, _no_op.identity)
        yield from rule.commute() if commutes else [rule]
    yield from map(_copy_rule, (_no_op.dropout_zero_rule, _no_op.dropout_inference_rule))


def _exact_constant(value: int) -> pattern.Constant:
    return pattern.Constant(value, rel_tol=0.0, abs_tol=0.0)
