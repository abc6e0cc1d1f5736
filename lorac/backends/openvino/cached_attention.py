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


class _Expansion(OpWriter):
    """The ops of one attention, which are inserted before it.

    Args:
        graph: the graph into which the nodes are inserted.
        node: the attention.
    """

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        super().__init__(graph)
        self.node = node
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
        grouped = self.numbers(0, self.key_heads, -1, fixed_size(self.q, 3))
        q = self.op(
            "Reshape", self.op("Mul", self.q, self.number(node.attributes["scale"].as_float(), _FLOAT)), grouped
        )
        key = (window, self.shared, self.distances, self.blocks)
        if key not in masks:
            masks[key] = self.masks(window)
        parts = []
        for keys, mask in zip((self.past_k, self.k), masks[key], strict=True):
            scores = self.op("MatMul", q, self.op("Transpose", keys, perm=[0, 1, 3, 2]))
            if softcap:
                soft = self.number(softcap, _FLOAT)
                scores = self.op("Mul", self.op("Tanh", self.op("Div", scores, soft)), soft)
            parts.append(self.op("Add", scores, mask))
        if self.sinks is not None:
            parts.append(self.sink_scores(q))
        sizes = self.op("Concat", *(self.op("Shape", part, start=3) for part in parts), axis=0)
        shares = self.op("Softmax", self.op("Concat", *parts, axis=3), axis=-1)
        past, new, *_ = self.tape.op_multi_out("Split", [shares, sizes], {"axis": 3}, num_outputs=len(parts))
        y = self.op("Add", self.op("MatMul", past, self.past_v), self.op("MatMul", new, self.v))
        apart = self.op("Reshape", y, self.numbers(0, self.heads, -1, fixed_size(self.v, 3)))
        self.finish(self.op("Transpose", apart, perm=[0, 2, 1, 3]))

    def masks(self, window: int) -> _Masks:
        """Write the visibility of past and new tokens, and biases by distance, as numbers to add to scores."""
        zero, one = self.number(0), self.number(1)
        room, length = (
            self.op("Range", zero, self.op("Squeeze", self.op("Shape", keys, start=2, end=3)), one)
            for keys in (self.past_k, self.k)
        )
        # Positions beyond the model's last one are all equal, so use indices among the new tokens instead.
        before = self.op("Unsqueeze", self.op("Cast", self.past, to=ir.DataType.INT64), self.numbers(1, 2))
        queries = self.op("Unsqueeze", length, self.numbers(0, 2))
        seen = [self.op("Less", room, before), self.op("LessOrEqual", length, queries)]
        keys = [room, self.op("Add", before, length)]
        if window > 0:
            first = self.op("Sub", self.op("Add", before, queries), self.number(window))
        elif window:
            places = self.op("Unsqueeze", self.places, self.numbers(2))
            first = self.op("Sub", self.op("Sub", places, self.op("Mod", places, self.number(-window))), one)
        if window:
            seen = [self.op("And", see, self.op("Greater", key, first)) for see, key in zip(seen, keys, strict=True)]
        if self.blocks is not None:
            axis, columns = self.numbers(2), range(fixed_size(self.blocks, 2))
            ends = [self.op("Slice", self.blocks, self.numbers(n), self.numbers(n + 1), axis) for n in columns]
            first = ends[0] if len(ends) > 1 else self.op("Add", before, queries)
            inside = [
                self.op("And", self.op("GreaterOrEqual", key, first), self.op("LessOrEqual", key, ends[-1]))
                for key in keys
            ]
            inside[0] = self.op("And", inside[0], self.op("Less", room, before))
            seen = [self.op("Or", see, block) for see, block in zip(seen, inside, strict=True)]
        found = []
        for see, key in zip(seen, keys, strict=True):
            scores = [self.number(score, _FLOAT) for score in (0, _HIDDEN)]
            hidden = self.op("Where", self.op("Unsqueeze", see, self.numbers(1)), *scores)
            if self.distances is not None:
                apart = self.op("Sub", self.op("Add", before, queries), key)
                last = self.op("Sub", self.op("Squeeze", self.op("Shape", self.distances, start=1)), one)
                near = self.op("Min", self.op("Max", apart, zero), last)
                bias = self.op("Transpose", self.op("Gather", self.distances, near, axis=1), perm=[1, 0, 2, 3])
                hidden = self.op("Add", hidden, bias)
            is_one = key is room and not window and self.distances is None and self.blocks is None  # for all queries
            found.append(hidden if is_one else self.group(hidden))
        return found[0], found[1]

    def group(self, mask: ir.Value) -> ir.Value:
        """Expand a mask (batch or 1, heads or 1, length or 1, keys) for scores whose query heads share keys."""
        if self.shared == 1:
            return mask
        if self.distances is None:
            return self.op("Tile", mask, self.numbers(1, 1, self.shared, 1))
        sizes = self.op("Concat", self.numbers(0, self.key_heads, -1), self.op("Shape", mask, start=3), axis=0)
        return self.op("Reshape", mask, sizes)

    def sink_scores(self, q: ir.Value) -> ir.Value:
        """Write each head's additional score (sink), once per query."""
        each = self.op("Reshape", self.sinks, self.numbers(1, self.key_heads, self.shared, 1))
        length = self.op("Shape", self.k, start=2, end=3)
        sizes = [self.op("Shape", q, start=0, end=1), self.numbers(self.key_heads, self.shared), length]
        wide = self.op("Expand", each, self.op("Concat", *sizes, axis=0))
        return self.op("Reshape", wide, self.numbers(0, self.key_heads, -1, 1))

    def finish(self, y: ir.Value) -> None:
        """Replace the attention by the ops, with the new keys and values in place of the updated caches."""
        old = self.node.outputs[0]
        y.shape, y.type = old.shape, old.type
        for made in self.tape.nodes:
            made.metadata_props.update(self.node.metadata_props)
        self.graph.insert_before(self.node, list(self.tape.nodes))
        for output, value in zip(self.node.outputs, (y, self.k, self.v), strict=True):
            output.replace_all_uses_with(value, replace_graph_outputs=True)
        self.graph.remove(self.node, safe=True)
