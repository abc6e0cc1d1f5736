"""Typed access to nodes of an fx graph, whose operands and values fx leaves untyped."""

from __future__ import annotations

from torch import Tensor, fx


def get_operand(node: fx.Node, index: int) -> fx.Node:
    """Return an operand that is the value of another node."""
    operand = node.args[index]
    assert isinstance(operand, fx.Node)
    return operand


def get_example(node: object) -> Tensor:
    """Return the fake tensor that describes a node's value."""
    assert isinstance(node, fx.Node)
    value: Tensor = node.meta["val"]
    return value
