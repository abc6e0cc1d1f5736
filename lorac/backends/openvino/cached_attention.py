"""A pass that expands cached attention into ONNX ops, since OpenVINO has no op for rows of different lengths.

Scores of cached tokens and of new tokens are computed separately, and concatenated for the softmax. So the cache is
read in place, and a call returns only the keys and values of its new tokens. Scores are (batch, key heads, queries that
share a head · length, keys): no key is repeated for the query heads that share it.
"""

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lorac.backends.onnx.export.attention import CACHED_ATTENTION_OP, LORAC_DOMAIN, fixed_size
from lorac.backends.onnx.passes import OnnxPass, OpWriter
from lorac.ir.graph.passes import PassResult

_FLOAT = ir.DataType.FLOAT
_HIDDEN = -3e38
"""Added to scores that do not count; bfloat16 has it too."""
_Masks = tuple[ir.Value, ir.Value]
_MaskKey = tuple[int, int, ir.Value | None, ir.Value | None]
"""Window, queries that share a head, distances and blocks."""


@dataclass(frozen=True)
class ExpandCachedAttention(OnnxPass):
    """Replace each cached attention by products and a softmax, which return only the new tokens' keys and values."""

    name: ClassVar[str] = "expand-cached-attention"

    def apply(self, model: ir.Model) -> PassResult:
        """Replace the nodes in place."""
        nodes = [node for node in model.graph if node.domain == LORAC_DOMAIN and node.op_type == CACHED_ATTENTION_OP]
        masks: dict[_MaskKey, _Masks] = {}
        for node in nodes:
            _Expansion(model.graph, node).replace(masks)
        return PassResult(changed=bool(nodes))


class _Expansion:
    """The ops of one attention, which are inserted before it.

    Args:
        graph: the graph into which the nodes are inserted.
        node: the attention.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.write, self.node = OpWriter(graph), node
        given = [value for value in node.inputs[:8] if value is not None]
        self.q, self.k, self.v, self.past_k, self.past_v, self.past, _, self.places = given
        self.sinks, self.distances, self.blocks = [*node.inputs[8:], None, None, None][:3]  # all are optional
        self.heads, self.key_heads = fixed_size(self.q, 1), fixed_size(self.k, 1)
        self.shared = self.heads // self.key_heads

    def replace(self, masks: dict[_MaskKey, _Masks]) -> None:
        """Insert the ops in place of the attention.

        Args:
            masks: ``_MaskKey`` -> the numbers to add to the scores of past and of new tokens.
        """
        node = self.node
        window, softcap = node.attributes["window"].as_int(), node.attributes["softcap"].as_float()
        grouped = self.write.numbers(0, self.key_heads, -1, fixed_size(self.q, 3))
        q = self.write.op(
            "Reshape",
            self.write.op("Mul", self.q, self.write.number(node.attributes["scale"].as_float(), _FLOAT)),
            grouped,
        )
        key = (window, self.shared, self.distances, self.blocks)
        if key not in masks:
            masks[key] = self.masks(window)
        parts = []
        for keys, mask in zip((self.past_k, self.k), masks[key], strict=True):
            scores = self.write.op("MatMul", q, self.write.op("Transpose", keys, perm=[0, 1, 3, 2]))
            if softcap:
                soft = self.write.number(softcap, _FLOAT)
                scores = self.write.op("Mul", self.write.op("Tanh", self.write.op("Div", scores, soft)), soft)
            parts.append(self.write.op("Add", scores, mask))
        if self.sinks is not None:
            parts.append(self.sink_scores(q))
        sizes = self.write.op("Concat", *(self.write.op("Shape", part, start=3) for part in parts), axis=0)
        shares = self.write.op("Softmax", self.write.op("Concat", *parts, axis=3), axis=-1)
        past, new, *_ = self.write.tape.op_multi_out("Split", [shares, sizes], {"axis": 3}, num_outputs=len(parts))
        y = self.write.op("Add", self.write.op("MatMul", past, self.past_v), self.write.op("MatMul", new, self.v))
        apart = self.write.op("Reshape", y, self.write.numbers(0, self.heads, -1, fixed_size(self.v, 3)))
        self.finish(self.write.op("Transpose", apart, perm=[0, 2, 1, 3]))

    def masks(self, window: int) -> _Masks:
        """Write the visibility of past and new tokens, and biases by distance, as numbers to add to scores."""
        zero, one = self.write.number(0), self.write.number(1)
        room, length = (
            self.write.op("Range", zero, self.write.op("Squeeze", self.write.op("Shape", keys, start=2, end=3)), one)
            for keys in (self.past_k, self.k)
        )
        # Positions beyond the model's last one are all equal, so use indices among the new tokens instead.
        before = self.write.op(
            "Unsqueeze", self.write.op("Cast", self.past, to=ir.DataType.INT64), self.write.numbers(1, 2)
        )
        queries = self.write.op("Unsqueeze", length, self.write.numbers(0, 2))
        seen = [self.write.op("Less", room, before), self.write.op("LessOrEqual", length, queries)]
        keys = [room, self.write.op("Add", before, length)]
        if window > 0:
            first = self.write.op("Sub", self.write.op("Add", before, queries), self.write.number(window))
        elif window:
            places = self.write.op("Unsqueeze", self.places, self.write.numbers(2))
            first = self.write.op(
                "Sub", self.write.op("Sub", places, self.write.op("Mod", places, self.write.number(-window))), one
            )
        if window:
            seen = [
                self.write.op("And", see, self.write.op("Greater", key, first))
                for see, key in zip(seen, keys, strict=True)
            ]
        if self.blocks is not None:
            axis, columns = self.write.numbers(2), range(fixed_size(self.blocks, 2))
            ends = [
                self.write.op("Slice", self.blocks, self.write.numbers(n), self.write.numbers(n + 1), axis)
                for n in columns
            ]
            first = ends[0] if len(ends) > 1 else self.write.op("Add", before, queries)
            inside = [
                self.write.op(
                    "And", self.write.op("GreaterOrEqual", key, first), self.write.op("LessOrEqual", key, ends[-1])
                )
                for key in keys
            ]
            inside[0] = self.write.op("And", inside[0], self.write.op("Less", room, before))
            seen = [self.write.op("Or", see, block) for see, block in zip(seen, inside, strict=True)]
        found = []
        for see, key in zip(seen, keys, strict=True):
            scores = [self.write.number(score, _FLOAT) for score in (0, _HIDDEN)]
            hidden = self.write.op("Where", self.write.op("Unsqueeze", see, self.write.numbers(1)), *scores)
            if self.distances is not None:
                apart = self.write.op("Sub", self.write.op("Add", before, queries), key)
                last = self.write.op(
                    "Sub", self.write.op("Squeeze", self.write.op("Shape", self.distances, start=1)), one
                )
                near = self.write.op("Min", self.write.op("Max", apart, zero), last)
                bias = self.write.op(
                    "Transpose", self.write.op("Gather", self.distances, near, axis=1), perm=[1, 0, 2, 3]
                )
                hidden = self.write.op("Add", hidden, bias)
            is_one = key is room and not window and self.distances is None and self.blocks is None  # for all queries
            found.append(hidden if is_one else self.group(hidden))
        return found[0], found[1]

    def group(self, mask: ir.Value) -> ir.Value:
        """Expand a mask (batch or 1, heads or 1, length or 1, keys) for scores whose query heads share keys."""
        if self.shared == 1:
            return mask
        if self.distances is None:
            return self.write.op("Tile", mask, self.write.numbers(1, 1, self.shared, 1))
        sizes = self.write.op(
            "Concat", self.write.numbers(0, self.key_heads, -1), self.write.op("Shape", mask, start=3), axis=0
        )
        return self.write.op("Reshape", mask, sizes)

    def sink_scores(self, q: ir.Value) -> ir.Value:
        """Write each head's additional score (sink), once per query."""
        each = self.write.op("Reshape", self.sinks, self.write.numbers(1, self.key_heads, self.shared, 1))
        length = self.write.op("Shape", self.k, start=2, end=3)
        sizes = [self.write.op("Shape", q, start=0, end=1), self.write.numbers(self.key_heads, self.shared), length]
        wide = self.write.op("Expand", each, self.write.op("Concat", *sizes, axis=0))
        return self.write.op("Reshape", wide, self.write.numbers(0, self.key_heads, -1, 1))

    def finish(self, y: ir.Value) -> None:
        """Replace the attention by the ops, with the new keys and values in place of the updated caches."""
        old = self.node.outputs[0]
        y.shape, y.type = old.shape, old.type
        for made in self.write.tape.nodes:
            made.metadata_props.update(self.node.metadata_props)
        self.write.graph.insert_before(self.node, list(self.write.tape.nodes))
        for output, value in zip(self.node.outputs, (y, self.k, self.v), strict=True):
            output.replace_all_uses_with(value, replace_graph_outputs=True)
        self.write.graph.remove(self.node, safe=True)
