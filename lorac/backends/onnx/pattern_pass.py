"""Rewrites by onnxscript's patterns, tried only at nodes where a pattern may match.

onnxscript tries every rule at every node, and sets up a match before it looks at the node's op.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
from onnxscript import rewriter
from onnxscript.rewriter import pattern


def make_rewrite_pass(rules: Iterable[pattern.RewriteRule]) -> ir.passes.InPlacePass:
    """Return a pass that changes what onnxscript's own pass changes by these rules, in this order."""
    return rewriter.RewritePass([_RulesByOp([*rules])])  # type: ignore[list-item]  # stands for a rule


class _RulesByOp:
    """Several rules as one, which at each node tries those whose pattern has the node's op at its end.

    Args:
        rules: in the order in which they are tried.
    """

    def __init__(self, rules: list[pattern.RewriteRule]) -> None:
        self.rules = rules
        self._by_op: dict[str, list[pattern.RewriteRule]] = {}
        # onnxscript asks for the options of the rule that was applied, and at first whether any rule leaves nodes.
        self._applied = next((rule for rule in rules if not rule.remove_nodes), rules[0])

    @property
    def name(self) -> str | None:
        """Return the name of the rule that was applied last."""
        return self._applied.name

    @property
    def remove_nodes(self) -> bool:
        """Return whether the rule that was applied last removes the nodes it matched."""
        return self._applied.remove_nodes

    @property
    def as_function(self) -> bool:
        """Return whether the rule that was applied last makes a function."""
        return self._applied.as_function

    def graph_pre_visitor(self) -> None:
        """Set every rule up for a graph."""
        for rule in self.rules:
            if rule.graph_pre_visitor:
                rule.graph_pre_visitor()

    def graph_post_visitor(self) -> None:
        """Clean up after a graph."""
        for rule in self.rules:
            if rule.graph_post_visitor:
                rule.graph_post_visitor()

    def try_rewrite(self, model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **options: object) -> object:
        """Return what the first rule that matches a node puts in its place."""
        if node.op_type not in self._by_op:
            ops = ((rule, rule._target_pattern.output_nodes[0].op) for rule in self.rules)
            self._by_op[node.op_type] = [rule for rule, op in ops if op.matches(node.op_type)]
        for rule in self._by_op[node.op_type]:
            replacement = rule.try_rewrite(model, graph, node, **options)  # type: ignore[arg-type]  # passed on
            if replacement is not None:
                self._applied = rule
                return replacement
        return None
