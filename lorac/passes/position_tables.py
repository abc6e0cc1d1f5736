"""Tables for values that depend only on positions, such as rotary angles, so that no call computes them."""

from collections.abc import Mapping

import torch
from torch import fx

from lorac.argument_types import Operands
from lorac.frontend.capture.decoder_families import DEFAULT_POSITIONS
from lorac.ir.graph.edit import add_constant, insert_call
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.interpreter import evaluate
from lorac.ir.graph.nodes import find_stored_tensors, get_example

aten = torch.ops.aten
_VALUE_AXES = 3
"""Number of axes of a tabulated value: rows of the batch, tokens, features."""


def tabulate(graph: Graph, positions: fx.Node) -> int | None:
    """Replace values (batch, length, features) that depend only on positions by table lookups.

    Args:
        graph: edited in place.
        positions: (batch, length).

    Returns:
        The longest sequence that these tables and the model's tables admit; None if there are no tables.
    """
    stored = find_stored_tensors(graph.exported)
    dependent: dict[fx.Node, None] = {positions: None}  # nodes that read only positions, constants and sizes
    constant = set(stored)
    for node in graph.fx.nodes:
        operands = [operand for operand in node.all_input_nodes if isinstance(operand.meta.get("val"), torch.Tensor)]
        if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or not operands:
            continue
        if constant.issuperset(operands):
            constant.add(node)
        elif all(operand in constant or operand in dependent for operand in operands):
            dependent[node] = None
    del dependent[positions]
    # Values per token that a node of another kind reads; assertions, which have no value, do not count.
    users = {node: [user for user in node.users if user.meta.get("val") is not None] for node in dependent}
    exits = [
        node
        for node in dependent
        if _is_token_value(node) and any(user not in dependent or not _is_token_value(user) for user in users[node])
    ]
    found = (_count_table_positions(node, positions, stored) for node in dependent if _is_lookup(node))
    limits = [limit for limit in found if limit is not None]
    if exits:
        limits.append(min([*limits, graph.longest or DEFAULT_POSITIONS]))
    tables = {node: _evaluate(node, positions, stored, min(limits)) for node in exits}
    for node, table in tables.items():
        weight = add_constant(graph.exported, table)
        node.replace_all_uses_with(insert_call(graph.exported, node, aten.embedding.default, weight, positions))
    return min(limits, default=None)


def _is_token_value(node: fx.Node) -> bool:
    value = node.meta["val"]
    if value.dim() != _VALUE_AXES or not value.is_floating_point() or _is_lookup(node):
        return False
    return isinstance(value.shape[2], int) and not isinstance(value.shape[1], int)


def _is_lookup(node: fx.Node) -> bool:
    operands: Operands = node.args
    return node.target is aten.embedding.default or (node.target is aten.index.Tensor and len(operands[1]) == 1)


def _count_table_positions(node: fx.Node, positions: fx.Node, stored: Mapping[fx.Node, torch.Tensor]) -> int | None:
    """Return how many positions a lookup in a table of the model admits; the model may add an offset before it.

    Returns:
        None if the row does not depend on positions, such as the row for a kind of token.
    """
    operands: Operands = node.args
    size = int(get_example(operands[0]).shape[0])
    rows = operands[1] if node.target is aten.embedding.default else operands[1][0]
    places = _evaluate(rows, positions, stored, size)
    if size > 1 and bool((places == places.flatten()[0]).all()):
        return None
    return int(((places >= 0) & (places < size)).cumprod(-1).sum())


def _evaluate(node: fx.Node, positions: fx.Node, stored: Mapping[fx.Node, torch.Tensor], count: int) -> torch.Tensor:
    """Compute a node's value at the positions 0 to ``count`` - 1 of one row: (count, ...)."""
    sizes = {str(size): value for size, value in zip(get_example(positions).shape, (1, count), strict=True)}
    return evaluate(node, {**stored, positions: torch.arange(count)[None]}, sizes)[0].contiguous()
