"""A pass that computes attention over a cache by ONNX Runtime's own op, ``com.microsoft::GroupQueryAttention``.

The op takes queries, keys and values as (batch, length, features), and rotates queries and keys itself where their
angles lie in tables. So the nodes that move axes and rotate before it are left out. Past and present may be one buffer,
into which only the new tokens are written.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from lorac.backends.onnx.export.attention import CACHED_ATTENTION_OP, LORAC_DOMAIN
from lorac.backends.onnx.passes import OnnxPass, module_around, shared_constant
from lorac.errors import Unavailable
from lorac.ir.graph.graph import Skip
from lorac.ir.graph.passes import PassResult

_MICROSOFT = "com.microsoft"
_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_QUERY_LENGTHS = 16
"""The index of the op's operand that holds how many new tokens each row has."""
_HEADS_LAST = [0, 2, 1, 3]
_ROTARY_MULTIPLE = 16
"""The op rotates vectors whose size is a multiple of this."""


@dataclass(frozen=True)
class UseGroupQueryAttention(OnnxPass):
    """Replace each attention over a cache by ``GroupQueryAttention``."""

    name: ClassVar[str] = "use-group-query-attention"

    def apply(self, model: ir.Model) -> PassResult:
        """Replace the nodes in place; report rotary positions that stay ops of their own.

        Raises:
            Unavailable: an attention computes in another dtype than the op does.
        """
        nodes = [node for node in model.graph if node.domain == LORAC_DOMAIN and node.op_type == CACHED_ATTENTION_OP]
        if not nodes:
            return PassResult(changed=False)
        model.graph.opset_imports[_MICROSOFT] = 1
        lengths = _SequenceLengths(model.graph, nodes[0])
        skips: list[Skip] = []
        for node in nodes:
            _replace(model.graph, node, lengths, skips)
        return PassResult(changed=True, skipped=tuple(skips))


class _SequenceLengths:
    """The lengths of each row in the form that the op takes, computed once for all layers.

    Args:
        graph: where the nodes go.
        first: the first attention.
    """

    def __init__(self, graph: ir.Graph, first: ir.Node) -> None:
        past, self.new = first.inputs[5], first.inputs[6]
        zero, one = (shared_constant(graph, f"{n}_int32", np.array(n, np.int32)) for n in (0, 1))
        total = ir.Node("", "Add", [past, self.new])
        last = ir.Node("", "Sub", [total.outputs[0], one])
        known = ir.Node("", "Max", [last.outputs[0], zero])  # the op cannot express a row that is empty and stays so
        longest = ir.Node("", "ReduceMax", [total.outputs[0]], [ir.AttrInt64("keepdims", 0)])
        graph.insert_before(graph[0], [total, last, known, longest])
        self.last, self.longest = known.outputs[0], longest.outputs[0]
        self._biases: dict[tuple[ir.Value | None, int], ir.Value | None] = {}

    def biases(self, graph: ir.Graph, node: ir.Node, distances: ir.Value | None) -> ir.Value | None:
        """Return the bias of each score (batch, heads or 1, length, longest), by distance or by chunk."""
        chunk, positions = max(-node.attributes["window"].as_int(), 0), node.inputs[7]
        if (distances, chunk) not in self._biases and (distances is not None or chunk):
            tape, dtype = Tape(), _dtype(node.outputs[0]).numpy()
            zero, one, size = (shared_constant(graph, f"{n}_int64", np.array(n)) for n in (0, 1, chunk))
            axes = [shared_constant(graph, f"axis_{axis}", np.array([axis])) for axis in (1, 2)]
            keys = tape.op("Range", [zero, tape.op("Cast", [self.longest], {"to": ir.DataType.INT64}), one])
            bias = None
            if distances is not None:
                apart = tape.op("Sub", [tape.op("Unsqueeze", [positions, axes[1]]), keys])
                found = tape.op("Gather", [distances, tape.op("Max", [apart, zero])], {"axis": 1})
                bias = tape.op("Transpose", [found], {"perm": [1, 0, 2, 3]})
            if chunk:
                begin = tape.op("Sub", [positions, tape.op("Mod", [positions, size])])
                hides = tape.op("Less", [keys, tape.op("Unsqueeze", [begin, axes[1]])])
                scores = [
                    shared_constant(graph, f"score_{i}", np.array(n, dtype))
                    for i, n in enumerate((np.finfo(dtype).min, 0))
                ]
                hidden = tape.op("Unsqueeze", [tape.op("Where", [hides, *scores]), axes[0]])
                bias = hidden if bias is None else tape.op("Add", [bias, hidden])
            graph.insert_before(node, list(tape.nodes))
            self._biases[distances, chunk] = bias
        return self._biases.get((distances, chunk))


_Tables = tuple[ir.Value, ir.Value]


def _replace(graph: ir.Graph, node: ir.Node, lengths: _SequenceLengths, skips: list[Skip]) -> None:
    attention = _attention_node(graph, node, lengths, skips)
    attention.metadata_props.update(node.metadata_props)
    graph.insert_before(node, attention)
    old = node.outputs[0]
    batch, length, heads, size = _dims(old)
    for output in attention.outputs:
        output.dtype = _dtype(old)
    attention.outputs[0].shape = ir.Shape([batch, length, _number(heads) * _number(size)])
    _replace_uses(graph, node, attention.outputs[0])
    for cached, present in zip(node.outputs[1:], attention.outputs[1:], strict=True):
        present.shape, present.name, cached.name = cached.shape, cached.name, None
        cached.replace_all_uses_with(present, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _attention_node(graph: ir.Graph, node: ir.Node, lengths: _SequenceLengths, skips: list[Skip]) -> ir.Node:
    """Build the op for an attention; its operands are inserted into the graph, and the op itself is not yet."""
    operands = [*node.inputs, None, None][:10]  # the last two may be missing
    q, k, v, past_k, past_v, _, _, positions, sinks, distances = operands
    assert q is not None and k is not None and v is not None
    if q.dtype not in _DTYPES:
        raise Unavailable(
            f"ONNX Runtime's attention over a cache does not compute in {q.dtype}",
            next_step="compile with dtype='float32', or with cache=False",
        )
    heads, cached_heads = _number(_dims(q)[1]), _number(_dims(k)[1])
    rotary = _rotary_operands(node, q, k, positions, skips)
    if rotary is not None:
        q, k = rotary[0]
    flat: list[ir.Value | None] = [_flatten_heads(graph, node, value) for value in (q, k, v)]
    split = flat[0].producer() if flat[0] is not None else None
    if split is not None and split.op_type == "Split" and list(split.outputs) == flat:  # the op takes them as one value
        flat = [split.inputs[0], None, None]
    window = node.attributes["window"].as_int()
    attributes = {
        "num_heads": heads,
        "kv_num_heads": cached_heads,
        "do_rotary": int(rotary is not None),
        "local_window_size": window if window > 0 else -1,
    }
    bias = lengths.biases(graph, node, distances)
    tables = (None, None) if rotary is None else rotary[1]
    inputs = [*flat, past_k, past_v, lengths.last, lengths.longest, *tables, None, bias, sinks]
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


def _rotary_operands(
    node: ir.Node, q: ir.Value, k: ir.Value, positions: ir.Value | None, skips: list[Skip]
) -> tuple[tuple[ir.Value, ir.Value], _Tables] | None:
    """Return queries and keys before their rotation and the tables of its angles, where the op can rotate them."""
    first, second = q.producer(), k.producer()
    if first is None or second is None or {first.op_type, second.op_type} != {"RotaryEmbedding"}:
        return None
    size = _dims(q)[3]
    if not isinstance(size, int) or size % _ROTARY_MULTIPLE:
        skips.append(Skip(module_around(node), f"the op does not rotate vectors of size {size}"))
        return None
    if first.inputs[1] is not positions or list(first.inputs[1:4]) != list(second.inputs[1:4]):
        skips.append(Skip(module_around(node), "queries and keys are not rotated by one table at the new positions"))
        return None
    (x, _, cos, sin), y = first.inputs[:4], second.inputs[0]
    assert x is not None and y is not None and cos is not None and sin is not None
    return (x, y), (cos, sin)


def _flatten_heads(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """Return a value (batch, heads, length, size) as (batch, length, heads · size)."""
    batch, heads, length, size = _dims(value)
    features = _number(heads) * _number(size)
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
    joined = ir.Node("", "Reshape", [apart, shared_constant(graph, f"joined_{features}", np.array([0, 0, features]))])
    graph.insert_before(before, joined)
    joined.outputs[0].shape, joined.outputs[0].dtype = ir.Shape([batch, length, features]), _dtype(value)
    return joined.outputs[0]


def _replace_uses(graph: ir.Graph, node: ir.Node, y: ir.Value) -> None:
    """Redirect readers of the attention's (batch, length, heads, size) to ``y`` (batch, length, heads · size)."""
    old = node.outputs[0]
    for user, _ in list(old.uses()):
        joined = user.outputs[0]
        if user.op_type == "Reshape" and joined.shape is not None and joined.shape.dims[2:] == _dims(y)[2:]:
            joined.replace_all_uses_with(y, replace_graph_outputs=True)
    sizes = np.array([0, 0, *_dims(old)[2:]])
    apart = ir.Node("", "Reshape", [y, shared_constant(graph, "apart_" + "_".join(map(str, sizes)), sizes)])
    graph.insert_before(node, apart)
    apart.outputs[0].shape, apart.outputs[0].dtype = old.shape, _dtype(old)
    old.replace_all_uses_with(apart.outputs[0], replace_graph_outputs=True)


def _dims(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    """Return the sizes of a value whose shape is known."""
    assert value.shape is not None
    return value.shape.dims


def _dtype(value: ir.Value) -> ir.DataType:
    """Return the dtype of a value, which is known."""
    assert value.dtype is not None
    return value.dtype


def _number(size: int | ir.SymbolicDim) -> int:
    """Return a size that does not vary."""
    assert isinstance(size, int)
    return size
