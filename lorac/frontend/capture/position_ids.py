"""Positions that a decoder counts by itself, from 0 on and for all rows alike, become the op of ``lorac.ir.graph``.

A decoder that is not told positions makes them with ``arange``, cuts them from a list that it holds, or counts the
tokens that are no padding. A text that comes in parts needs its own for each row. So whatever is computed of the
numbers alone gets the axis of the rows that it lacks, and a count of tokens becomes their numbers, which it is where a
text has no padding. Numbers of which a bias of attention is made stay: that is a matter of distances
(``lorac.passes.relative_positions``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lorac.errors import Unavailable
from lorac.ir.graph import attention_ops as attending
from lorac.ir.graph.attention_ops import WITHOUT_CACHE, find_token_input
from lorac.ir.graph.edit import insert_call

aten = torch.ops.aten
_COUNTS = frozenset({aten.arange.default, aten.arange.start, aten.arange.start_step})
_SPREAD = frozenset({aten.expand.default, aten.repeat.default})
"""Ops that give each row what all have."""
_BIAS = 3
"""Which operand of an attention is its bias."""


def make_positions_per_row(program: ExportedProgram) -> None:
    """Have the text's positions be those of each row, in place, where its model counts them by itself.

    Args:
        program: as captured, with attention marked.

    Raises:
        Unavailable: it does with them what cannot be done by rows.
    """
    named = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    ids = named[find_token_input(named)]
    length, biased = str(ids.meta["val"].shape[1]), _of_biases(program.graph)
    numbers = [n for n in program.graph.nodes if is_token_numbering(n, length) or _cuts(program, n, length)]
    for node in [node for node in numbers if node not in biased]:
        by_row = insert_call(program, node, attending.POSITIONS, ids)
        _carry_on(program, node, by_row)
    for node in [node for node in program.graph.nodes if _counts_tokens(node, ids)]:
        by_row = insert_call(program, node, attending.POSITIONS, ids)
        counted = insert_call(program, node, aten.add.Tensor, by_row, 1)
        node.replace_all_uses_with(insert_call(program, node, aten.to.dtype, counted, node.meta["val"].dtype))


def _counts_tokens(node: fx.Node, ids: fx.Node) -> bool:
    """Whether a node is how many tokens of a text up to each are not a certain one: its padding."""
    if node.target is not aten.cumsum.default or node.args[1] not in {1, -1}:
        return False
    counted: Any = node.args[0]
    while counted.target in _CASTS:
        counted = counted.args[0]
    return counted.target is aten.ne.Scalar and counted.args[0] is ids


_CASTS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default})


def is_token_numbering(node: fx.Node, length: str) -> bool:
    """Whether a node is the numbers from 0 on, as many as a size says, which torch calls ``length``."""
    if node.target not in _COUNTS or str(node.meta["val"].shape[0]) != length:
        return False
    begin, step = (node.args[0], (*node.args, 1)[_STEPPED]) if len(node.args) >= _STEPPED else (0, 1)
    return (begin, step) == (0, 1) and not node.meta["val"].is_floating_point()


def _cuts(program: ExportedProgram, node: fx.Node, length: str) -> bool:
    """Whether a node is the same, cut from a list that the program holds, with an axis for all rows or without."""
    if node.target is not aten.slice.Tensor or str(node.meta["val"].shape[-1]) != length:
        return False
    operands: Any = node.args
    held, axis, begin = (*operands, 0, 0)[:3]
    named = {getattr(spec.arg, "name", ""): str(spec.target) for spec in program.graph_signature.input_specs}
    stored = {**program.state_dict, **program.constants}.get(named.get(held.name, ""))
    if stored is None or stored.is_floating_point() or stored.numel() != stored.shape[-1] or begin != 0:
        return False
    return axis % stored.dim() == stored.dim() - 1 and bool((stored.flatten() == torch.arange(stored.numel())).all())


_STEPPED = 2
"""Operands of ``arange`` from which on it is told where to begin."""


def _of_biases(graph: fx.Graph) -> set[fx.Node]:
    """What the biases of attentions are made of."""
    found: set[fx.Node] = set()
    waiting = [node.args[_BIAS] for node in graph.nodes if node.target is attending.ATTENTION]
    while waiting:
        node = waiting.pop()
        if isinstance(node, fx.Node) and node not in found:
            found.add(node)
            waiting += node.all_input_nodes
    return found


def _carry_on(program: ExportedProgram, node: fx.Node, by_row: fx.Node) -> None:
    """Have what reads a value of all rows read that of each."""
    for user in list(node.users):
        value = user.meta.get("val")
        if not isinstance(value, torch.Tensor):
            continue  # a check, or a size, of which a part of a text knows nothing
        apart = by_row.meta["val"].dim() > node.meta["val"].dim()
        if apart and user.target is aten.unsqueeze.default and user.args[1] == 0 and _alike(value.shape[1:], node):
            _carry_on(program, user, by_row)
        elif user.target in _SPREAD and _alike(value.shape, by_row):
            user.replace_all_uses_with(by_row)
        else:
            _replaced(program, user, (node, by_row))


def _alike(shape: Any, node: fx.Node) -> bool:
    """Whether a shape is that of a node's value. Sizes that vary are compared by what torch calls them."""
    return [str(size) for size in shape] == [str(size) for size in node.meta["val"].shape]


def _replaced(program: ExportedProgram, user: fx.Node, pair: tuple[fx.Node, fx.Node]) -> None:
    """A node's value of one operand by rows: either it has them already, or whatever reads it is told."""
    node, by_row = pair
    operands: Any = fx.map_arg(user.args, lambda operand: by_row if operand is node else operand)
    try:
        if user.target is aten.gather.default and operands[0].meta["val"].shape[0] == 1 and operands[1] == 1:
            listed = insert_call(program, user, aten.select.int, operands[0], 0, 0)
            made = insert_call(program, user, aten.index.Tensor, listed, [by_row])
        else:
            made = insert_call(program, user, user.target, *operands, **user.kwargs)
    except Exception as error:
        raise _unfit(user) from error
    old, new = user.meta["val"].shape, made.meta["val"].shape
    if _alike(old, made):
        user.replace_all_uses_with(made)
        return
    inner = old[1:] if len(old) == len(new) and old[0] == 1 else old
    if [str(size) for size in inner] != [str(size) for size in new[1:]]:
        raise _unfit(user)
    _carry_on(program, user, made)


def _unfit(user: fx.Node) -> Unavailable:
    stack = list((user.meta.get("nn_module_stack") or {}).values())
    where = f"'{stack[-1][0]}'" if stack else "the model"
    return Unavailable(f"{where} counts positions in a way that cannot differ from row to row", next_step=WITHOUT_CACHE)
