"""Attention to a cache by ONNX Runtime's own op, ``com.microsoft::GroupQueryAttention``.

The op takes queries, keys and values as (batch, length, features), and turns queries and keys by itself where their
angles lie in tables: what the model does for that before, moving axes and turning, is left out. Past and present may
be one buffer, into which only what is new is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from lorac.backends.onnx.attention import CACHED_ATTENTION_OP, LORAC_DOMAIN
from lorac.errors import Unavailable

_MICROSOFT = "com.microsoft"
_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_QUERY_LENGTHS = 16
"""Which operand of the op says how many tokens each row brings."""
_HEADS_LAST = [0, 2, 1, 3]
_ROTARY_MULTIPLE = 16
"""Of what sizes are multiples that the op turns by itself."""


def use_group_query_attention(model: ir.Model) -> None:
    """Put the op in the place of each attention to a cache, in place.

    Raises:
        Unavailable: in another precision than the op computes in.
    """
    nodes = [node for node in model.graph if node.domain == LORAC_DOMAIN and node.op_type == CACHED_ATTENTION_OP]
    if not nodes:
        return
    model.graph.opset_imports[_MICROSOFT] = 1
    lengths = _SequenceLengths(model.graph, nodes[0])
    for node in nodes:
        _replace(model.graph, node, lengths)


class _SequenceLengths:
    """Each row's tokens as the op is told them, made once for all layers."""

    def __init__(self, graph: ir.Graph, first: ir.Node) -> None:
        past, self.new = first.inputs[5], first.inputs[6]
        zero, one = (_constant(graph, f"{n}_int32", np.array(n, np.int32)) for n in (0, 1))
        total = ir.Node("", "Add", [past, self.new])
        last = ir.Node("", "Sub", [total.outputs[0], one])
        known = ir.Node("", "Max", [last.outputs[0], zero])  # of a row that is empty and stays so the op knows nothing
        longest = ir.Node("", "ReduceMax", [total.outputs[0]], [ir.AttrInt64("keepdims", 0)])
        graph.insert_before(graph[0], [total, last, known, longest])
        self.last, self.longest = known.outputs[0], longest.outputs[0]
        self._biases: dict[ir.Value, ir.Value] = {}

    def biases(self, graph: ir.Graph, node: ir.Node, distances: ir.Value) -> ir.Value:
        """What is added to each score (batch, heads, length, longest), of what is by distance; made once for all."""
        if distances not in self._biases:
            places: Any = node.inputs[7]
            zero, one = (_constant(graph, f"{n}_int64", np.array(n)) for n in (0, 1))
            longest = ir.Node("", "Cast", [self.longest], [ir.AttrInt64("to", ir.DataType.INT64)])
            keys = ir.Node("", "Range", [zero, longest.outputs[0], one])
            column = ir.Node("", "Unsqueeze", [places, _constant(graph, "axis_2", np.array([2]))])
            apart = ir.Node("", "Sub", [column.outputs[0], keys.outputs[0]])
            behind = ir.Node("", "Max", [apart.outputs[0], zero])
            found = ir.Node("", "Gather", [distances, behind.outputs[0]], [ir.AttrInt64("axis", 1)])
            by_row = ir.Node("", "Transpose", [found.outputs[0]], [ir.AttrInt64s("perm", [1, 0, 2, 3])])
            graph.insert_before(node, [longest, keys, column, apart, behind, found, by_row])
            self._biases[distances] = by_row.outputs[0]
        return self._biases[distances]


@dataclass(frozen=True)
class _RotaryOperands:
    """Queries and keys before they are turned, and the tables of their angles."""

    q: Any
    k: Any
    tables: tuple[ir.Value | None, ir.Value | None] = (None, None)


def _replace(graph: ir.Graph, node: ir.Node, lengths: _SequenceLengths) -> None:
    attend = _attention_node(graph, node, lengths)
    attend.metadata_props.update(node.metadata_props)
    graph.insert_before(node, attend)
    old: Any = node.outputs[0]
    batch, length, heads, size = old.shape
    for made in attend.outputs:
        made.dtype = old.dtype
    attend.outputs[0].shape = ir.Shape([batch, length, heads * size])
    _replace_uses(graph, node, attend.outputs[0])
    for held, new in zip(node.outputs[1:], attend.outputs[1:], strict=True):
        new.shape, new.name, held.name = held.shape, held.name, None
        held.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _attention_node(graph: ir.Graph, node: ir.Node, lengths: _SequenceLengths) -> ir.Node:
    """The op for an attention, which is not in the graph yet; what it takes is."""
    operands: Any = [*node.inputs, None, None][:10]  # what may be left out may be missing at the end
    q, k, v, past_k, past_v, _, _, places, sinks, distances = operands
    if q.dtype not in _DTYPES:
        raise Unavailable(
            f"ONNX Runtime's attention to a cache does not compute in {q.dtype}",
            next_step="compile with dtype='float32', or with cache=False",
        )
    own = _operands_before_rotary(q, k, places)
    flat = _packed_operands([_flatten_heads(graph, node, value) for value in (own.q, own.k, v)])
    window = node.attributes["window"].as_int()
    attributes = {
        "num_heads": q.shape[1],
        "kv_num_heads": k.shape[1],
        "do_rotary": int(own.tables[0] is not None),
        "local_window_size": window or -1,
    }
    bias = None if distances is None else lengths.biases(graph, node, distances)
    inputs = [*flat, past_k, past_v, lengths.last, lengths.longest, *own.tables, None, bias, sinks]
    return ir.Node(
        _MICROSOFT,
        "GroupQueryAttention",
        [*inputs, *[None] * (_QUERY_LENGTHS - len(inputs)), lengths.new],
        [
            *(ir.AttrInt64(name, value) for name, value in attributes.items()),
            *(ir.AttrFloat32(name, node.attributes[name].as_float()) for name in ("scale", "softcap")),
        ],
        num_outputs=3,
        name=node.name,
    )


def _operands_before_rotary(q: ir.Value, k: ir.Value, places: ir.Value) -> _RotaryOperands:
    """Queries and keys before they are turned, where both are by the same tables at the new tokens' places."""
    turns = [value.producer() for value in (q, k)]
    if not all(turn is not None and turn.op_type == "RotaryEmbedding" for turn in turns):
        return _RotaryOperands(q, k)
    first, second = (list(turn.inputs) for turn in turns if turn is not None)
    size = q.shape[3] if q.shape is not None else None
    if first[1] is not places or first[1:4] != second[1:4] or not isinstance(size, int) or size % _ROTARY_MULTIPLE:
        return _RotaryOperands(q, k)
    return _RotaryOperands(first[0], second[0], (first[2], first[3]))


def _packed_operands(flat: list[ir.Value]) -> list[ir.Value | None]:
    """Queries, keys and values as the op takes them: as one, where they are cut from one and all of it."""
    cut = flat[0].producer()
    if cut is None or cut.op_type != "Split" or list(cut.outputs) != flat:
        return list(flat)
    return [cut.inputs[0], None, None]


def _flatten_heads(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """A value (batch, heads, length, size) as (batch, length, heads · size)."""
    shape: Any = value.shape
    features = shape[1] * shape[3]
    moved = value.producer()
    if moved is not None and moved.op_type == "Transpose" and moved.attributes["perm"].as_ints() == tuple(_HEADS_LAST):
        apart = moved.inputs[0]
    else:
        transpose = ir.Node("", "Transpose", [value], [ir.AttrInt64s("perm", _HEADS_LAST)])
        graph.insert_before(before, transpose)
        apart = transpose.outputs[0]
    split = apart.producer() if apart is not None else None
    whole = split.inputs[0] if split is not None and split.op_type == "Reshape" else None
    if whole is not None and whole.shape is not None and len(whole.shape) == 3 and whole.shape[2] == features:
        return whole
    joined = ir.Node("", "Reshape", [apart, _constant(graph, f"joined_{features}", np.array([0, 0, features]))])
    graph.insert_before(before, joined)
    made: Any = joined.outputs[0]
    made.shape, made.dtype = ir.Shape([shape[0], shape[2], features]), value.dtype
    return joined.outputs[0]


def _replace_uses(graph: ir.Graph, node: ir.Node, y: ir.Value) -> None:
    """Give those who read the attention's (batch, length, heads, size) what is (batch, length, heads · size)."""
    old: Any = node.outputs[0]
    for user, _ in list(old.uses()):
        joined = user.outputs[0]
        if user.op_type == "Reshape" and joined.shape is not None and joined.shape.dims[2:] == y.shape.dims[2:]:  # type: ignore[union-attr]  # set above
            joined.replace_all_uses_with(y, replace_graph_outputs=True)
    sizes = np.array([0, 0, *old.shape[2:]])
    apart = ir.Node("", "Reshape", [y, _constant(graph, "apart_" + "_".join(map(str, sizes)), sizes)])
    graph.insert_before(node, apart)
    apart.outputs[0].shape, apart.outputs[0].dtype = old.shape, old.dtype
    old.replace_all_uses_with(apart.outputs[0], replace_graph_outputs=True)


def _constant(graph: ir.Graph, name: str, numbers: np.ndarray[Any, Any]) -> ir.Value:
    if name not in graph.initializers:
        value = ir.val(name, const_value=ir.tensor(numbers, name=name))
        graph.register_initializer(value)
    return graph.initializers[name]
