"""attention: attention written out in a transformers model becomes the op of ``lorac.ir.graph.attention_ops``.

Some models compute ``softmax(q·kᵀ·scale + mask)·v`` in their own ops, add a bias to the scores, or fill the scores that
the mask hides. A softmax between two products identifies attention. The mask is transformers', which is a token tensor
during a trace, or the model's own: a value that depends only on sizes is computed, and shows its window.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import fx

from lorac.argument_types import Operands
from lorac.frontend.capture.decoder_families import DEFAULT_POSITIONS, find_sequence
from lorac.ir.graph import attention_ops
from lorac.ir.graph.edit import add_constant, inline, insert_call
from lorac.ir.graph.graph import Graph, Skip
from lorac.ir.graph.interpreter import evaluate
from lorac.ir.graph.nodes import find_module_path, find_sources, find_stored_tensors
from lorac.ir.graph.passes import PassResult, TracePass
from lorac.ir.graph.symbolic_shapes import constant_size

aten = torch.ops.aten
_PRODUCTS = frozenset({aten.matmul.default, aten.bmm.default})
_SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
_QUOTIENTS = frozenset({aten.div.Tensor, aten.div_.Tensor})
_MULTIPLES = frozenset({aten.mul.Tensor, aten.mul_.Tensor})
_SAME_VALUES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.clone.default})
_CASTS = frozenset(
    {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.dropout.default, aten.alias.default}
)
"""Ops that do not change values in evaluation, up to rounding."""
_PASSING = _SAME_VALUES | _CASTS | {aten.contiguous.default}
_AXES = 4
"""Number of axes of queries, keys and values: rows, heads, tokens, features."""
_SUMS = frozenset({aten.add.Tensor, aten.add_.Tensor})
_FILLS = frozenset({aten.masked_fill.Scalar, aten.masked_fill_.Scalar, aten.masked_fill.Tensor, aten.where.self})
_ADDED_MASKS = frozenset({aten.where.self, aten.where.ScalarOther})
"""Ops by which ``AttentionInterface.mask`` makes the mask of an encoder from booleans."""
_MAXIMA = frozenset({aten.maximum.default, aten.max.other})
_HIDDEN = -1e4
"""Scores up to this value have no share of a softmax."""
_SHAPED = frozenset({aten.ones_like.default, attention_ops.POSITIONS})
_REPEATING = frozenset({aten.expand.default, aten.unsqueeze.default, aten.slice.Tensor})


@final
@dataclass(frozen=True)
class FoldWrittenAttention(TracePass):
    """Replace attention that is written out by the op."""

    name: ClassVar[str] = "attention"

    def apply(self, graph: Graph) -> PassResult:
        reader, skips = _ScoreReader(graph), list[Skip]()
        changed = _fold_calls(graph)
        for node in list(graph.find(attention_ops.ATTENTION)):  # a model may have put the mask into a bias
            args: Any = node.args
            q, k, v, bias, *others = args
            joined = None if any((*others[:3], others[6])) else _find_joined(k, v, bias)
            bias, window = reader.read_bias(joined[-1][0] if joined else bias)
            if joined is not None and window is not None and bias is None:
                (k, encoded_k), (v, encoded_v), (_, seen) = joined
                attend = functools.partial(_attend_to_both, float(others[3]), window, str(args[-1]))
                made = inline(graph.exported, node, attend, [q, k, encoded_k, v, encoded_v, seen])[1][0]
                graph.replace_node(node, made)
                changed = True
            elif window is not None:
                if bias is not None and (
                    bias.target is aten.expand.default or isinstance(bias.meta["val"].shape[-2], int)
                ):
                    q, k, bias = _join_key_bias(graph, node, bias, reader)
                node.args = (q, k, v, bias, *others[:4], True, window, *others[6:])
                changed = True
        for written in list(graph.find(*_PRODUCTS)):
            operands = reader.match(written)
            if isinstance(operands, Skip):
                skips.append(operands)
            elif operands is not None:
                insert = functools.partial(insert_call, graph.exported, written)
                result = insert(attention_ops.ATTENTION, *operands, find_module_path(written))
                result = insert(aten.transpose.int, result, 1, 2)
                if written.meta["val"].dim() != _AXES:
                    result = insert(aten.flatten.using_ints, result, 0, 1)
                written.replace_all_uses_with(result)
                _erase_unused(written)
                changed = True
        return PassResult(changed, tuple(skips))


def _erase_unused(node: fx.Node) -> None:
    """Erase a node without readers, and the nodes that only it reads; unused dropout would count as an effect."""
    if node.op != "call_function" or any(
        user.target is not aten._assert_tensor_metadata.default for user in node.users
    ):
        return
    operands = node.all_input_nodes
    for unused in (*node.users, node):
        node.graph.erase_node(unused)
    for operand in operands:
        _erase_unused(operand)


def _fold_calls(graph: Graph) -> bool:
    """Replace calls of torch's attention with a mask of transformers; return whether there are some."""
    changed = False
    for node in list(graph.find(aten.scaled_dot_product_attention.default)):
        operands: Operands = node.args
        if any(source.target is attention_ops.MASK for source in find_sources(operands[3:4])):
            scale = node.kwargs.get("scale") or operands[0].meta["val"].shape[-1] ** -0.5
            others = None, None, None, scale, False, 0, 0.0, find_module_path(node)
            made = insert_call(graph.exported, node, attention_ops.ATTENTION, *operands[:4], *others)
            graph.replace_node(node, insert_call(graph.exported, node, aten.transpose.int, made, 1, 2))
            changed = True
    return changed


def _join_key_bias(
    graph: Graph, node: fx.Node, bias: fx.Node, reader: "_ScoreReader"
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Return queries, keys and bias of an attention; a bias of keys alone becomes a further feature of each key."""
    operands: Operands = node.args
    q, k, by_key = operands[0], operands[1], bias.all_input_nodes[0] if bias.target is aten.expand.default else bias
    if by_key.meta["val"].shape[1:3] != (k.meta["val"].shape[1], 1):
        return q, k, bias
    insert = functools.partial(insert_call, graph.exported, node)
    by_key = reader.look_up_keys(by_key, insert)
    one = insert(
        aten.full_like.default, insert(aten.slice.Tensor, q, 3, 0, 1), 1 / operands[attention_ops.SCALE_OPERAND]
    )
    keys = insert(aten.cat.default, [k, insert(aten.transpose.int, by_key, 2, 3)], 3)
    return insert(aten.cat.default, [q, one], 3), keys, None


def _find_joined(*operands: Any) -> list[tuple[Any, Any]] | None:
    """Return keys, values and masks of the sequence and of the encoded tokens under one softmax; or None.

    T5Gemma 2's attention has them, its masks expanded by the length of the sequence. The last mask is of booleans.
    """
    cats = [operand for operand in operands if operand is not None and operand.target is aten.cat.default]
    parts = [tuple(cat.args[0]) for cat in cats if len(cat.args[0]) == 2]
    if len(parts) < len(operands) or parts[-1][0].target is not attention_ops.MASK:
        return None
    own, encoded = parts.pop()
    mask = encoded.args[0] if encoded.target is aten.expand.default else encoded
    return [*parts, (own, mask.args[0])] if mask.target in _ADDED_MASKS else None


def _attend_to_both(  # noqa: PLR0913, PLR0917  (operands)
    scale: float,
    window: int,
    module: str,
    q: torch.Tensor,
    k: torch.Tensor,
    encoded_k: torch.Tensor,
    v: torch.Tensor,
    encoded_v: torch.Tensor,
    seen: torch.Tensor,
) -> tuple[torch.Tensor]:
    """Attend to a sequence and to encoded tokens by one softmax, as attention to the sequence alone and a mean.

    A sink stands for the encoded tokens: its score is the logarithm of their sum. A further feature subtracts it from
    all scores of a query, so the sink is 0. A further feature of ones among the values gives the share of the sequence.
    """
    shared = q.shape[1] // encoded_k.shape[1]
    encoded_k, encoded_v = (x.repeat_interleave(shared, 1) for x in (encoded_k, encoded_v))
    scores = (q @ encoded_k.transpose(2, 3) * scale).masked_fill(~seen, torch.finfo(q.dtype).min)
    total, ones = scores.logsumexp(-1, keepdim=True), torch.ones_like(k[..., :1])
    more = (torch.cat([x, y], -1) for x, y in ((q, total / -scale), (k, ones), (v, ones)))
    sinks = torch.zeros_like(q[0, :, 0, 0])
    y = torch.ops.lorac.attention(*more, None, None, sinks, None, scale, True, window, 0.0, module)
    encoded = (torch.softmax(scores, -1) @ encoded_v).transpose(1, 2)
    return (y[..., :-1] + (1 - y[..., -1:]) * encoded,)


@dataclass
class _Scores:
    """The parts of scores, found by a walk back from their softmax.

    Attributes:
        scale: factor of the scores.
        bias: node that is added to the scores.
        window: window of a causal mask; None without a mask.
        filled: another mask, and the boolean value in it that hides a score.
    """

    scale: float = 1.0
    bias: fx.Node | None = None
    window: int | None = None
    filled: tuple[fx.Node, bool] | None = None

    def hide(self, window: int | None) -> None:
        """Record a causal mask; of two windows, the narrower counts."""
        if window is not None:
            self.window = min(window, self.window) if window and self.window else window or self.window or 0


class _ScoreReader:
    """A reader of attention scores, from the softmax back to the product of queries and keys.

    Args:
        graph: a graph at level traced; computed masks bound its longest sequence.
    """

    def __init__(self, graph: Graph) -> None:
        named = {node.name: node for node in graph.placeholders()}
        ids = named[find_sequence(named).ids]
        self._graph, self._count = graph, min(graph.longest or DEFAULT_POSITIONS, DEFAULT_POSITIONS)
        self._ids, (self._rows, self._length) = ids, ids.meta["val"].shape
        # What is computed of the ids' shape alone.
        shaped = {
            node: node.target(torch.zeros(1, self._count, dtype=torch.int64))
            for node in ids.users
            if node.target in _SHAPED
        }
        self._known = {**find_stored_tensors(graph.exported), **shaped}
        self._windows: dict[tuple[object, bool | None], int | None] = {}

    def match(self, written: fx.Node) -> tuple[Any, ...] | Skip | None:
        """Return the operands of ``attention`` for the product of a softmax and values; None for other products."""
        operands: Operands = written.args
        weights, value = operands[0], operands[1]
        while weights.target in _PASSING:
            weights = weights.args[0]
        if weights.target not in _SOFTMAX or weights.args[1] not in {-1, weights.meta["val"].dim() - 1}:
            return None
        scores, node, skip = _Scores(), weights.args[0], Skip(written.name, "its scores are no product with a mask")
        while (inner := self._peel(node, scores)) is not None:
            node = inner
        operands = node.args
        if node.target is aten.baddbmm.default:
            added, operands = operands[0], operands[1:]
            alpha: Any = node.kwargs.get("alpha", 1)
            adds = added.target is not aten.zeros.default
            if adds and (scores.bias is not None or scores.scale != 1 or node.kwargs.get("beta", 1) != 1):
                return skip
            scores.scale, scores.bias = scores.scale * alpha, added if adds else scores.bias
        elif node.target not in _PRODUCTS:
            return skip
        insert = functools.partial(insert_call, self._graph.exported, written)
        key, rank = operands[1], operands[1].meta["val"].dim()
        swapped = key.target is aten.transpose.int and {axis % rank for axis in key.args[1:]} == {rank - 2, rank - 1}
        key = key.args[0] if swapped else insert(aten.transpose.int, key, rank - 2, rank - 1)
        q, k, v = (self._find_heads(written, operand) for operand in (operands[0], key, value))
        if q is None or k is None or v is None:
            return skip
        bias, window = self.read_bias(scores.bias)
        scores.hide(window)
        if bias is not None and bias.meta["val"].dim() == _AXES - 1:  # (rows · heads, …) or (heads, …)
            bias = insert(aten.unflatten.int, bias, 0, [-1, q.meta["val"].shape[1]])
        seen = None
        if scores.filled is not None:
            seen, hides = scores.filled
            seen = insert(aten.logical_not.default, seen) if hides else seen
        return q, k, v, bias, seen, None, None, float(scores.scale), scores.window is not None, scores.window or 0, 0.0

    def read_bias(self, bias: Any) -> tuple[fx.Node | None, int | None]:
        """Return a bias without its causal mask, None for nothing, and the mask's window, None without a mask."""
        window = self._find_window(bias, None)
        if bias is None or window is not None:
            return None, window
        if bias.target is aten.expand.default and bias.args[0].meta["val"].dim() == _AXES:
            return bias.args[0], None
        scores, node = _Scores(bias=bias), bias
        while scores.window is None and node is not None:
            node = self._peel(node, scores) or (node.args[0] if node.target in _REPEATING else None)
        known = scores.window is not None and scores.scale == 1 and scores.filled is None
        return (node, scores.window) if known else (bias, None)

    def look_up_keys(self, bias: fx.Node, insert: Callable[..., fx.Node]) -> fx.Node:
        """Return a bias (rows, heads, 1, keys), looked up where it depends on the numbers of keys alone."""
        value = self._evaluate(bias)
        if value is None:
            return bias
        self._graph.longest = self._count
        table = add_constant(self._graph.exported, value[0, :, 0].T.contiguous())
        found = insert(aten.embedding.default, table, insert(attention_ops.POSITIONS, self._ids))
        return insert(aten.unsqueeze.default, insert(aten.transpose.int, found, 1, 2), 2)

    def _peel(self, node: fx.Node, scores: _Scores) -> fx.Node | None:
        """Return the scores from which a node computes scores, and record the step; None if the op is unknown."""
        operands: Operands = node.args
        if node.target in _PASSING or (node.target in _MAXIMA and self._hides(operands[1])):
            return operands[0]
        if node.target in _QUOTIENTS | _MULTIPLES and isinstance(operands[1], int | float):
            scores.scale *= 1 / operands[1] if node.target in _QUOTIENTS else operands[1]
            return operands[0]
        if (
            node.target in _MULTIPLES
            and scores.window is not None
            and scores.window == self._find_window(operands[1], False)
        ):
            return operands[0]  # the factor is 1 where scores are seen
        if node.target in _FILLS and self._hides(operands[2]):
            where = node.target is aten.where.self
            mask, inner = operands[0 if where else 1], operands[int(where)]
            window = self._find_window(mask, not where)
            if window is None and scores.filled is None:
                hidden = self._evaluate(mask)
                scores.filled = (mask, not where) if hidden is None or bool((hidden != where).any()) else None
                return inner
        elif node.target in _SUMS and not node.kwargs:
            windows = [self._find_window(operand, None) for operand in operands]
            window = next((found for found in windows if found is not None), None)
            inner = operands[int(windows[0] is not None)]
            if window is None and scores.scale == 1 and scores.bias is None:
                scores.bias = operands[1]
                return operands[0]
        else:
            return None
        scores.hide(window)
        return None if window is None else inner

    def _hides(self, value: object) -> bool:
        """Return whether a score has no share of the softmax."""
        if isinstance(value, fx.Node):
            if value.meta["val"].dim():
                return False
            value = float(evaluate(value, self._known, {}))
        return isinstance(value, int | float) and value <= _HIDDEN

    def _find_window(self, mask: object, hides: bool | None) -> int | None:
        """Return the window of a causal mask, as ``attention`` takes it; None for other values.

        Args:
            mask: a node.
            hides: the boolean value that hides a score; None for an additive mask.
        """
        if not isinstance(mask, fx.Node):
            return None
        if (mask, hides) not in self._windows:
            self._windows[mask, hides] = self._compute_window(mask, hides)
        return self._windows[mask, hides]

    def _compute_window(self, mask: fx.Node, hides: bool | None) -> int | None:
        given: Any = {node: node.args[2] for node in find_sources([mask]) if node.target is attention_ops.MASK}
        if mask in given and hides is None:
            return int(given[mask])
        shape = [str(size) for size in (1, 1, *mask.meta["val"].shape)]
        if set(shape[-2:]) != {str(self._length)} or not {"1", str(self._rows)}.issuperset(shape[:-2]):
            return None
        value = self._evaluate(mask)
        if value is None:
            return None
        seen = value == 0 if hides is None else value.bool() != hides
        known = seen | (value <= _HIDDEN) if hides is None else value.bool() == value
        if value.numel() != self._count**2 or not known.all():
            return None
        places, seen = torch.arange(self._count), seen.view(self._count, self._count)
        for window in (0, int(seen[-1].sum()), *given.values()):
            if torch.equal(attention_ops.visible_keys(places[None], places, window)[0, 0], seen):
                if not given:
                    self._graph.longest = self._count
                return int(window)
        return None

    def _evaluate(self, mask: fx.Node) -> torch.Tensor | None:
        """Return the value of a mask for one row of the longest sequence; None if it depends on more than lengths."""
        sizes, like = [1, self._count, self._count], torch.zeros(())
        tokens: Any = [node for node in find_sources([mask]) if node.target is attention_ops.MASK]
        masks = {node: torch.ops.lorac.mask(like, sizes, node.args[2]) for node in tokens}
        try:
            return evaluate(mask, self._known | masks, {str(self._rows): 1, str(self._length): self._count})
        except Exception:  # an op may raise any error for sizes with which it was not traced, or for missing values
            return None

    def _find_heads(self, before: fx.Node, node: fx.Node) -> fx.Node | None:
        """Split the joint axis of rows and heads of a value into two; return a value with separate axes unchanged."""
        inner = node
        while inner.meta["val"].dim() != _AXES and inner.target in _PASSING:
            inner = inner.all_input_nodes[0]
        if inner.meta["val"].dim() == _AXES:
            return inner
        heads = constant_size(node.meta["val"].shape[0] // self._rows)
        return insert_call(self._graph.exported, before, aten.unflatten.int, node, 0, [-1, heads]) if heads else None
