"""A pass that computes cached attention by ONNX Runtime's own op, ``com.microsoft::GroupQueryAttention``.

The op takes queries, keys and values as (batch, length, features), and rotates queries and keys itself if their angles
are in tables. So the nodes before it that move axes and rotate are removed. Past and present may share one buffer, into
which only the new tokens are written.

The op is causal. If new tokens may see later ones, as an image's tokens do, an ``If`` computes attention again in plain
ops, over the keys and values that the op has written.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from lorac.backends.onnx.export.attention import CACHED_ATTENTION_OP, LORAC_DOMAIN
from lorac.backends.onnx.passes import OnnxPass, OpWriter, module_around, number_constant
from lorac.errors import Unavailable
from lorac.ir.graph.graph import Skip
from lorac.ir.graph.passes import PassResult

_MICROSOFT = "com.microsoft"
_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_QUERY_LENGTHS = 16
"""The index of the op's operand that holds how many new tokens each row has."""
_BLOCKS = 10
"""The index of the operand of lorac's op that has the tokens that see each other."""
_HEADS_LAST = [0, 2, 1, 3]
_ROTARY_MULTIPLE = 16
"""The op rotates vectors whose size is a multiple of this."""


@dataclass(frozen=True)
class UseGroupQueryAttention(OnnxPass):
    """Replace each cached attention by ``GroupQueryAttention``."""

    name: ClassVar[str] = "use-group-query-attention"

    def apply(self, model: ir.Model) -> PassResult:
        """Replace the nodes in place; report rotary positions that stay separate ops.

        Raises:
            Unavailable: the op does not support an attention's dtype.
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
    """The lengths of each row in the form that the op accepts, computed once for all layers.

    Args:
        graph: the graph into which the nodes are inserted.
        first: the first attention.
    """

    def __init__(self, graph: ir.Graph, first: ir.Node) -> None:
        past, self.new = first.inputs[5], first.inputs[6]
        zero, one = (number_constant(graph, n, np.int32) for n in (0, 1))
        total = ir.Node("", "Add", [past, self.new])
        last = ir.Node("", "Sub", [total.outputs[0], one])
        known = ir.Node("", "Max", [last.outputs[0], zero])  # the op cannot express a row that is empty and stays empty
        longest = ir.Node("", "ReduceMax", [total.outputs[0]], [ir.AttrInt64("keepdims", 0)])
        graph.insert_before(graph[0], [total, last, known, longest])
        self.last, self.longest = known.outputs[0], longest.outputs[0]
        self._biases: dict[tuple[ir.Value | None, int], ir.Value | None] = {}
        self._any_block: dict[ir.Value, ir.Value] = {}

    def biases(self, graph: ir.Graph, node: ir.Node, distances: ir.Value | None) -> ir.Value | None:
        """Return the bias of each score (batch, heads or 1, length, longest) by distance or by chunk, or None."""
        chunk, positions = max(-node.attributes["window"].as_int(), 0), node.inputs[7]
        if (distances, chunk) not in self._biases and (distances is not None or chunk):
            write, dtype = OpWriter(graph), _dtype(node.outputs[0])
            op, zero, axis = write.op, write.number(0), write.numbers(2)
            keys = op("Range", zero, op("Cast", self.longest, to=ir.DataType.INT64), write.number(1))
            bias = None
            if distances is not None:
                apart = op("Sub", op("Unsqueeze", positions, axis), keys)
                found = op("Gather", distances, op("Max", apart, zero), axis=1)
                bias = op("Transpose", found, perm=[1, 0, 2, 3])
            if chunk:
                begin = op("Sub", positions, op("Mod", positions, write.number(chunk)))
                hides = op("Less", keys, op("Unsqueeze", begin, axis))
                scores = [write.number(score, dtype) for score in (_lowest(dtype), 0)]
                hidden = op("Unsqueeze", op("Where", hides, *scores), write.numbers(1))
                bias = hidden if bias is None else op("Add", bias, hidden)
            graph.insert_before(node, list(write.tape.nodes))
            self._biases[distances, chunk] = bias
        return self._biases.get((distances, chunk))

    def any_block(self, graph: ir.Graph, node: ir.Node, blocks: ir.Value) -> ir.Value:
        """Return whether any new token sees tokens after it."""
        if blocks not in self._any_block:
            write = OpWriter(graph)
            other = write.op("Sub", blocks, write.op("Unsqueeze", node.inputs[7], write.numbers(2)))
            most = write.op("ReduceMax", write.op("Abs", other), keepdims=0)
            self._any_block[blocks] = write.op("Cast", most, to=ir.DataType.BOOL)
            graph.insert_before(node, list(write.tape.nodes))
        return self._any_block[blocks]


_Tables = tuple[ir.Value, ir.Value]


def _replace(graph: ir.Graph, node: ir.Node, lengths: _SequenceLengths, skips: list[Skip]) -> None:
    attention = _attention_node(graph, node, lengths, skips)
    attention.metadata_props.update(node.metadata_props)
    graph.insert_before(node, attention)
    old = node.outputs[0]
    batch, length, heads, size = _dims(old)
    for output in attention.outputs:
        output.dtype = _dtype(old)
    shape = attention.outputs[0].shape = ir.Shape([batch, length, _number(heads) * _number(size)])
    y = attention.outputs[0]
    if len(node.inputs) > _BLOCKS and (blocks := node.inputs[_BLOCKS]) is not None:
        any_block, writers = lengths.any_block(graph, node, blocks), (OpWriter(graph), OpWriter(graph))
        outputs = [_attend_to_blocks(writers[0], node, attention, lengths.longest), writers[1].op("Identity", y)]
        branches = [
            ir.AttrGraph(name, ir.Graph([], [output], nodes=write.tape.nodes, name=f"{node.name}_{name}"))
            for name, output, write in zip(("then_branch", "else_branch"), outputs, writers, strict=True)
        ]
        choice = ir.Node("", "If", [any_block], branches)
        graph.insert_before(node, choice)
        y = choice.outputs[0]
        for output in (y, *outputs):
            output.dtype, output.shape = _dtype(old), shape
    _replace_uses(graph, node, y)
    for cached, present in zip(node.outputs[1:], attention.outputs[1:], strict=True):
        present.shape, present.name, cached.name = cached.shape, cached.name, None
        cached.replace_all_uses_with(present, replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _attend_to_blocks(write: OpWriter, node: ir.Node, attention: ir.Node, longest: ir.Value) -> ir.Value:
    """Write an attention whose tokens also see their blocks, over the keys and values that another attention wrote."""

    def copy(value: ir.Value) -> ir.Value:  # a copy inside the graph
        source = value.producer()
        if source is None or source.op_type not in {"RotaryEmbedding", "Transpose"}:
            return value
        operands = [copy(operand) if operand and index == 0 else operand for index, operand in enumerate(source.inputs)]
        copied: ir.Value = write.tape.op(source.op_type, operands, source.attributes, domain=source.domain)
        return copied

    op, numbers, scalar = write.op, write.numbers, write.number
    rotated, key, blocks = node.inputs[0], node.inputs[1], node.inputs[_BLOCKS]
    assert rotated is not None and key is not None and blocks is not None
    (_, heads, _, size), kv_heads = _dims(rotated), _number(_dims(key)[1])
    dtype = _dtype(node.outputs[0])
    count = op("Cast", longest, to=ir.DataType.INT64)
    ends = op("Reshape", count, numbers(-1))
    k, v = (op("Slice", present, numbers(0), ends, numbers(2)) for present in attention.outputs[1:])
    q = op("Reshape", copy(rotated), numbers(0, kv_heads, _number(heads) // kv_heads, -1, _number(size)))
    q = op("Mul", q, scalar(node.attributes["scale"].as_float(), dtype))
    scores = op("MatMul", q, op("Unsqueeze", op("Transpose", k, perm=[0, 1, 3, 2]), numbers(2)))
    if softcap := node.attributes["softcap"].as_float():
        cap = scalar(softcap, dtype)
        scores = op("Mul", op("Tanh", op("Div", scores, cap)), cap)
    own = op("Unsqueeze", node.inputs[7], numbers(2))
    keys = op("Range", scalar(0), count, scalar(1))
    seen = op("LessOrEqual", keys, own)
    if (window := node.attributes["window"].as_int()) > 0:
        seen = op("And", seen, op("Greater", keys, op("Sub", own, numbers(window))))
    first, last = own, blocks
    if _dims(blocks)[2] == 2:
        first, last = (op("Slice", blocks, numbers(begin), numbers(begin + 1), numbers(2)) for begin in (0, 1))
    block = op("And", op("GreaterOrEqual", keys, first), op("LessOrEqual", keys, last))
    seen = op("Unsqueeze", op("Or", seen, block), numbers(1, 2))
    scores = op("Where", seen, scores, scalar(_lowest(dtype), dtype))
    y = op("MatMul", op("Softmax", scores, axis=-1), op("Unsqueeze", v, numbers(2)))
    y = op("Transpose", op("Reshape", y, numbers(0, _number(heads), -1, _number(size))), perm=_HEADS_LAST)
    return op("Reshape", y, numbers(0, 0, -1))


def _attention_node(graph: ir.Graph, node: ir.Node, lengths: _SequenceLengths, skips: list[Skip]) -> ir.Node:
    """Build the op for an attention; insert its operands into the graph, but not the op itself."""
    operands = [*node.inputs, None, None][:_BLOCKS]  # the last two are optional
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
    """Return queries and keys before their rotation, and the tables of its angles; None if the op cannot rotate."""
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
    """Transpose a value (batch, heads, length, size) to (batch, length, heads · size)."""
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
    joined = ir.Node("", "Reshape", [apart, number_constant(graph, [0, 0, features])])
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
    apart = ir.Node("", "Reshape", [y, number_constant(graph, [0, 0, *map(_number, _dims(old)[2:])])])
    graph.insert_before(node, apart)
    apart.outputs[0].shape, apart.outputs[0].dtype = old.shape, _dtype(old)
    old.replace_all_uses_with(apart.outputs[0], replace_graph_outputs=True)


def _dims(value: ir.Value) -> tuple[int | ir.SymbolicDim, ...]:
    """Return the sizes of a value with a known shape."""
    assert value.shape is not None
    return value.shape.dims


def _dtype(value: ir.Value) -> ir.DataType:
    """Return the known dtype of a value."""
    assert value.dtype is not None
    return value.dtype


def _number(size: int | ir.SymbolicDim) -> int:
    """Return a static size as a number."""
    assert isinstance(size, int)
    return size


def _lowest(dtype: ir.DataType) -> float:
    """Return the least finite number of a dtype."""
    return float(np.finfo(dtype.numpy()).min)
