"""What depends on positions alone, looked up in tables: the angles of rotary positions are not computed by calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export.graph_signature import InputKind

from lorac.ir.graph.edit import add_constant, insert_call
from lorac.ir.graph.graph import Graph

aten = torch.ops.aten
_VIEWED = 3
"""Axes of what is looked up: rows of the batch, tokens, features."""
DEFAULT_POSITIONS = 4096
"""How many positions a table has, where the model names no longest text."""


def tabulate(graph: Graph, positions: fx.Node) -> int | None:
    """Replace values (batch, length, features) that depend on positions alone; returns how many positions there are.

    Args:
        graph: edited in place.
        positions: (batch, length).

    Returns:
        The longest text, by these tables and by those that the model has itself; None where there are none.
    """
    stored = _stored(graph)
    closed = _closed(graph, positions, stored)
    exits = [node for node in closed if _leaves(node, closed)]
    found = (_own_table(node, positions, stored) for node in closed if _looks_up(node))
    limits = [limit for limit in found if limit is not None]
    count = (
        min([*limits, graph.longest or DEFAULT_POSITIONS]) if exits else None
    )  # of a model that says nothing: enough for most
    tables = {node: _evaluated(node, positions, stored, count or 0) for node in exits}
    for node, table in tables.items():
        _look_up(graph, node, positions, table)
    return min([*limits, *([] if count is None else [count])], default=None)


def _stored(graph: Graph) -> dict[fx.Node, torch.Tensor]:
    """The tensors of the program's own, by placeholder."""
    program = graph.exported
    held = {**program.constants, **program.state_dict}
    named = {
        getattr(spec.arg, "name", ""): held.get(str(spec.target))
        for spec in program.graph_signature.input_specs
        if spec.kind is not InputKind.USER_INPUT
    }
    return {n: found for n in graph.placeholders() if isinstance(found := named.get(n.name), torch.Tensor)}


def _closed(graph: Graph, positions: fx.Node, stored: Mapping[fx.Node, torch.Tensor]) -> dict[fx.Node, None]:
    """The nodes that are computed of positions, and of nothing else but constants and sizes, in order."""
    closed: dict[fx.Node, None] = {positions: None}
    still = set(stored)
    for node in graph.fx.nodes:
        operands = [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), torch.Tensor)]
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or not operands:
            continue
        if all(operand in still for operand in operands):
            still.add(node)
        elif all(operand in still or operand in closed for operand in operands):
            closed[node] = None
    del closed[positions]
    return closed


def _leaves(node: fx.Node, closed: Mapping[fx.Node, None]) -> bool:
    """Whether a node is a value of each token that something else reads."""
    users = [user for user in node.users if user.meta.get("val") is not None]  # those without one are checks
    return _is_value(node) and any(user not in closed or not _is_value(user) for user in users)


def _is_value(node: fx.Node) -> bool:
    value = node.meta["val"]
    if value.dim() != _VIEWED or not value.is_floating_point() or _looks_up(node):
        return False
    return isinstance(value.shape[2], int) and not isinstance(value.shape[1], int)


def _looks_up(node: fx.Node) -> bool:
    """Whether a node takes rows of a table."""
    operands: Any = node.args
    return node.target is aten.embedding.default or (node.target is aten.index.Tensor and len(operands[1]) == 1)


def _own_table(node: fx.Node, positions: fx.Node, stored: Mapping[fx.Node, torch.Tensor]) -> int | None:
    """How many positions a table of the model's own has, where a node looks them up; an offset may be added before.

    Returns:
        None where rows are looked up that do not count on with positions, such as the one of a kind of token.
    """
    operands: Any = node.args
    size = int(operands[0].meta["val"].shape[0])
    asked = operands[1] if node.target is aten.embedding.default else operands[1][0]
    places = _evaluated(asked, positions, stored, size)
    if size > 1 and bool((places == places.flatten()[0]).all()):
        return None
    return int(((places >= 0) & (places < size)).cumprod(-1).sum())


def _evaluated(node: fx.Node, positions: fx.Node, stored: Mapping[fx.Node, torch.Tensor], count: int) -> torch.Tensor:
    """A value at each position, of one row of them: (count, ...)."""
    known: dict[fx.Node, Any] = {**stored, positions: torch.arange(count)[None]}
    sizes = {str(size): given for size, given in zip(positions.meta["val"].shape, (1, count), strict=True)}
    with torch.no_grad():
        value: torch.Tensor = _computed(node, known, sizes)[0]
    return value.contiguous()


def _computed(node: fx.Node, known: dict[fx.Node, Any], sizes: Mapping[str, int]) -> Any:
    """A node's value, computed from what is known; sizes are those of one row with all positions."""
    if node not in known:
        example = node.meta.get("val")
        if isinstance(example, torch.SymInt | int):
            known[node] = sizes.get(str(example), example)
        else:
            arguments = fx.map_arg((node.args, node.kwargs), lambda operand: _computed(operand, known, sizes))
            known[node] = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]  # an op
    return known[node]


def _look_up(graph: Graph, node: fx.Node, positions: fx.Node, table: torch.Tensor) -> None:
    held = add_constant(graph.exported, table)
    found = insert_call(graph.exported, node, aten.embedding.default, held, positions)
    node.replace_all_uses_with(found)
