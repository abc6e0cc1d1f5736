"""attention: attention that a transformers model writes out becomes the op of ``lorac.ir.graph.attention_ops`` too.

Some decoders (Falcon, RemBERT, GPT-NeoX-Japanese) ask transformers for the mask and add it to scores of their own:
``softmax(q·kᵀ·scale + mask)·v``. Others (BLOOM, MPT) add a bias to the scores before, or fill the scores that the mask
hides. The mask of a trace is a token, so its readers show where they attend.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx

from lorac.argument_types import Operands
from lorac.ir.graph import attention_ops
from lorac.ir.graph.edit import insert_call
from lorac.ir.graph.graph import Graph, Level, Skip
from lorac.ir.graph.nodes import find_module_path
from lorac.ir.graph.passes import Pass, PassResult

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


@final
@dataclass(frozen=True)
class FoldWrittenAttention(Pass):
    """Replace attention that is written out and applies a causal mask of all earlier tokens.

    Attributes:
        causal: whether every mask of the graph is such a mask.
    """

    name: ClassVar[str] = "attention"
    reads: ClassVar[Level] = Level.TRACED
    leaves: ClassVar[Level] = Level.TRACED
    causal: bool = True

    def apply(self, graph: Graph) -> PassResult:
        readers = dict.fromkeys(reader for mask in graph.find(attention_ops.MASK) for reader in _list_readers(mask))
        if not self.causal:
            why = "a mask hides more than later tokens"
            return PassResult(False, tuple(Skip(reader.name, why) for reader in readers))
        changed = False
        for query, key, value, bias, scale, written in filter(None, map(_match, readers)):  # none matches once replaced
            insert = functools.partial(insert_call, graph.exported, written)
            heads = [-1, query.meta["val"].shape[1]]  # of a bias (rows · heads, …) or (heads, …)
            added = None if bias is None else insert(aten.unflatten.int, bias, 0, heads)
            operands = query, key, value, added, None, None, scale, True, 0, 0.0
            result = insert(attention_ops.ATTENTION, *operands, find_module_path(written))
            result = insert(aten.transpose.int, result, 1, 2)
            if written.meta["val"].dim() != _AXES:
                result = insert(aten.flatten.using_ints, result, 0, 1)
            written.replace_all_uses_with(result)
            _erase_unused(written)
            changed = True
        return PassResult(changed)


def _erase_unused(node: fx.Node) -> None:
    """Erase a node without readers, and the nodes that it alone reads; dropout would count as an effect otherwise."""
    if node.op != "call_function" or any(
        user.target is not aten._assert_tensor_metadata.default for user in node.users
    ):
        return
    operands = node.all_input_nodes
    for unused in (*node.users, node):
        node.graph.erase_node(unused)
    for operand in operands:
        _erase_unused(operand)


def _match(masked: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None, float, fx.Node] | None:
    """Return the attention whose scores a node masks, by adding a mask or by filling; None for other nodes.

    Returns:
        queries, keys, values, bias, scale, and the node of the result, which may have rows and heads as one axis.
    """
    operands: Operands = masked.args
    scores: fx.Node | None = None
    if masked.target is aten.masked_fill.Scalar and operands[2] <= torch.finfo(torch.float16).min:
        scores = operands[0]
    elif masked.target is aten.add.Tensor:
        scores = next((node for node in masked.all_input_nodes if node.target is not attention_ops.MASK), None)
    weights = next((node for node in _list_readers(masked) if node.target in _SOFTMAX), None)
    if scores is None or weights is None:
        return None
    result: Any = next((node for node in _list_readers(weights) if node.target in _PRODUCTS), None)
    factors = _read_scores(scores)
    value = None if result is None else _find_heads(result.args[1])
    return None if factors is None or value is None else (*factors[:2], value, *factors[2:], result)


def _list_readers(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that read a value, or the same value in another form."""
    for user in node.users:
        yield user
        if user.target in _PASSING:
            yield from _list_readers(user)


def _read_scores(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, float] | None:
    """Return queries, keys, the bias that is added to their products, and the scale of these."""
    scale, bias = 1.0, None
    while True:
        operands: Operands = node.args
        if node.target in _QUOTIENTS | _MULTIPLES and isinstance(operands[1], int | float):
            scale *= 1 / operands[1] if node.target in _QUOTIENTS else operands[1]
        elif node.target is aten.add.Tensor and scale == 1 and bias is None and not node.kwargs:
            bias = operands[1]
        elif node.target not in _PASSING:
            break
        node = operands[0]
    if node.target is aten.baddbmm.default:
        added, operands = operands[0], operands[1:]
        alpha: Any = node.kwargs.get("alpha", 1)
        adds = added.target is not aten.zeros.default
        if adds and (bias is not None or scale != 1 or node.kwargs.get("beta", 1) != 1):
            return None
        scale, bias = scale * alpha, added if adds else bias
    elif node.target not in _PRODUCTS:
        return None
    query, key = _find_heads(operands[0]), _untranspose(operands[1])
    return None if query is None or key is None else (query, key, bias, float(scale))


def _untranspose(node: fx.Node) -> fx.Node | None:
    """Return keys, given their transposition."""
    operands: Operands = node.args
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
