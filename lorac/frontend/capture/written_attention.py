"""Attention that a transformers model writes out becomes the op of ``lorac.ir.graph.attention_ops`` too.

Some decoders (Falcon, RemBERT, GPT-NeoX-Japanese) ask transformers for the mask and add it to scores of their own:
``softmax(q·kᵀ·scale + mask)·v``. The mask of a trace is a token, so the sums that read it tell where they attend.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from lorac.ir.graph import attention_ops
from lorac.ir.graph.edit import insert_call
from lorac.ir.graph.nodes import find_module_path

aten = torch.ops.aten
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_QUOTIENTS = frozenset({aten.div.Tensor, aten.div_.Tensor})
_MULTIPLES = frozenset({aten.mul.Tensor, aten.mul_.Tensor})
_SAME_VALUES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default})
_CASTS = frozenset(
    {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.dropout.default, aten.alias.default}
)
"""Ops that leave values unchanged in evaluation, up to rounding."""
_PASSING = _SAME_VALUES | _CASTS | {aten.contiguous.default}
_AXES = 4
"""Axes of queries, keys and values: rows, heads, tokens, features."""


@dataclass(frozen=True)
class _WrittenAttention:
    """Operands of an attention, and the node of its result (batch, heads, length, size)."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    result: fx.Node


def fold_written_attention(program: ExportedProgram) -> None:
    """Replace attention that is written out and adds a causal mask of all earlier tokens, in place."""
    sums = [user for node in program.graph.nodes if node.target is attention_ops.MASK for user in node.users]
    for found in filter(None, map(_match, dict.fromkeys(sums))):
        operands = found.query, found.key, found.value, None, None, None, found.scale, True, 0, 0.0
        path = find_module_path(found.result)
        attended = insert_call(program, found.result, attention_ops.ATTENTION, *operands, path)
        heads_first = insert_call(program, found.result, aten.transpose.int, attended, 1, 2)
        found.result.replace_all_uses_with(heads_first)
        _erase_unused(found.result)


def _erase_unused(node: fx.Node) -> None:
    """Erase a node that nothing reads, and what only it reads; dropout would count as an effect otherwise."""
    if node.op != "call_function" or any(
        user.target is not aten._assert_tensor_metadata.default for user in node.users
    ):
        return
    operands = node.all_input_nodes
    for unused in (*node.users, node):
        node.graph.erase_node(unused)
    for operand in operands:
        _erase_unused(operand)


def _match(total: fx.Node) -> _WrittenAttention | None:
    """Return the attention whose scores a sum with a mask is; None for other sums."""
    if total.target is not aten.add.Tensor:
        return None
    scores: Any = next((node for node in total.all_input_nodes if node.target is not attention_ops.MASK), None)
    weights = next((node for node in _list_readers(total) if node.target in _SOFTMAX), None)
    if scores is None or weights is None:
        return None
    result: Any = next((node for node in _list_readers(weights) if node.target in _PRODUCTS), None)
    factors = _read_scores(scores)
    if result is None or factors is None or result.meta["val"].dim() != _AXES:
        return None
    query, key, scale = factors
    return _WrittenAttention(query, key, result.args[1], scale, result)


def _list_readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read a value, or the same value in another form."""
    for user in node.users:
        yield user
        if user.target in _PASSING:
            yield from _list_readers(user)


def _read_scores(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """Return queries, keys and the scale of their products."""
    scale = 1.0
    while True:
        operands: Any = node.args
        if node.target in _QUOTIENTS | _MULTIPLES and isinstance(operands[1], int | float):
            scale *= 1 / operands[1] if node.target in _QUOTIENTS else operands[1]
        elif node.target not in _PASSING:
            break
        node = operands[0]
    if node.target is aten.baddbmm.default and operands[0].target is aten.zeros.default:
        alpha: Any = node.kwargs.get("alpha", 1)
        scale, operands = scale * alpha, operands[1:]
    elif node.target not in _PRODUCTS:
        return None
    query, key = _find_heads(operands[0]), _untranspose(operands[1])
    return None if query is None or key is None else (query, key, float(scale))


def _untranspose(node: fx.Node) -> fx.Node | None:
    """Return keys, given their transposition."""
    operands: Any = node.args
    rank = node.meta["val"].dim()
    swaps = node.target is aten.transpose.int and {axis % rank for axis in operands[1:]} == {rank - 2, rank - 1}
    return _find_heads(operands[0]) if swaps else None


def _find_heads(node: fx.Node) -> fx.Node | None:
    """Return a value with rows and heads apart, given itself or with both as one axis."""
    while node.meta["val"].dim() != _AXES:
        if node.target not in _PASSING:
            return None
        node = node.all_input_nodes[0]
    return node
