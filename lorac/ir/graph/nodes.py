"""Typed access to the values of nodes, which fx leaves untyped."""

from __future__ import annotations

from torch import Tensor, fx


def get_example(node: object) -> Tensor:
    """Return the fake tensor that describes a node's value."""
    assert isinstance(node, fx.Node)
    value: Tensor = node.meta["val"]
    return value
