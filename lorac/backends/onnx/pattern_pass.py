"""Rewrites of emitted programs by onnxscript's patterns, tried only at nodes where a pattern may match.

onnxscript tries every rule at every node, and sets up a match before it looks at the node's op.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import pattern


def make_rewrite_pass(rules: Iterable[pattern.RewriteRule]) -> ir.passes.InPlacePass:
    """A pass that applies rules in the order given: what it makes of a program is what onnxscript's own pass makes."""
    return rewriter.RewritePass([_try_matching_nodes_only(rule) for rule in rules])


def _try_matching_nodes_only(rule: pattern.RewriteRule) -> pattern.RewriteRule:
    """The rule, not tried at nodes whose op is another than the one that its pattern is matched from."""
    own, op = rule.try_rewrite, rule._target_pattern.output_nodes[0].op

    def try_rewrite(model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **options: Any) -> Any:
        return own(model, graph, node, **options) if op.matches(node.op_type) else None

    made = copy.copy(rule)
    made.try_rewrite = try_rewrite  # type: ignore[method-assign, assignment]  # of this copy alone
    return made
