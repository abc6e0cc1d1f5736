"""The op of the package lorac-native, put in the place of the ops of low-rank pairs when a session is created.

What a pair makes of a layer's input is three ops: two products, with matrices that are not known before the call, and
a sum. For a row of one token each takes longer to start than to compute. ``lorac.native::AddLowRank`` does the work of
all of them, for all layers of a fused projection at once, whose outputs it writes apart as ``Split`` would. Where
tokens are packed (``packing``) it reads how many each row brings, so that they need not be padded for it.

A saved program has the standard ops, whoever wrote it, so it runs everywhere.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from lorac.backends.onnx.model_files import walk_nodes
from lorac.backends.onnxruntime.leading_axes import Shape, remove_unused, replace_nodes, restore_leading_axes, shape_of
from lorac.backends.onnxruntime.segment_indices import FROM_ROWS, FROM_SEGMENTS, TO_SEGMENTS
from lorac.ir.algebra import operands
from lorac.ir.graph.attention_ops import NEW_LENGTHS

DOMAIN, OP, VERSION = "lorac.native", "AddLowRank", 2
_PAIR = 1
_SCALES = {operands.G: 2, operands.H: 4, operands.C: 8}
"""Operand -> its bit in the attribute ``parts``, in the order of the op's inputs, which follow the pair."""


def use_native_op(model: onnx.ModelProto, *, half: bool = False) -> int:
    """Replace the ops of low-rank pairs by the op of lorac-native.

    Args:
        model: edited in place.
        half: whether slots of pairs become inputs in float16.

    Returns:
        How many layers the op computes now.
    """
    finder = _LayerFinder(model.graph)
    groups = list(finder.find_groups())
    if half:
        groups = finder.narrowable(groups)
    if not groups:
        return 0
    ops = {id(group.where): group.make_node() for group in groups}
    removed = {id(node) for group in groups for node in group.replaced}
    nodes = [ops.get(id(node), node) for node in finder.nodes if id(node) in ops or id(node) not in removed]
    replace_nodes(model.graph, nodes)
    model.opset_import.add(domain=DOMAIN, version=VERSION)
    restore_leading_axes(model.graph, DOMAIN)
    remove_unused(model.graph)
    layers = [layer for group in groups for layer in group.layers if layer.parts]
    if half:
        _narrow(model.graph, {name for layer in layers for name in layer.factors})
    return len(layers)


def _narrow(graph: onnx.GraphProto, names: set[str]) -> None:
    """Make slots float16; their defaults too."""
    for value in graph.input:
        if value.name in names:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in graph.initializer:
        if tensor.name in names:
            narrow = onnx.numpy_helper.to_array(tensor).astype("float16")
            tensor.CopyFrom(onnx.numpy_helper.from_array(narrow, tensor.name))


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer whose product and pair are summed.

    Attributes:
        output, base, x: names of its output, of what the pair is added to, and of what the pair reads.
        parts: the bits of ``operands``; 0 for a layer without an adapter, whose output is its base.
        operands: names of slots, in the order of the op's inputs.
        packed: whether x and base are packed tokens, which rows bring different numbers of.
        nodes: the ops that compute the output from the other values.
    """

    output: str
    base: str
    x: str
    parts: int = 0
    operands: Sequence[str] = ()
    packed: bool = False
    nodes: Sequence[onnx.NodeProto] = ()

    @property
    def factors(self) -> Sequence[str]:
        """The slots of the pair."""
        return self.operands[:2]


@dataclass(frozen=True, eq=False)
class _Group:
    """Layers that one op computes.

    Attributes:
        base: the name of their products, side by side.
        widths: their numbers of features.
        where: the op in whose place the op is put; it is the last that is replaced, or before all readers.
    """

    base: str
    layers: Sequence[_Layer]
    widths: Sequence[int]
    where: onnx.NodeProto
    replaced: Sequence[onnx.NodeProto]

    def make_node(self) -> onnx.NodeProto:
        """Return the op."""
        first = next(layer for layer in self.layers if layer.parts)
        inputs = [first.x, self.base, *(name for layer in self.layers for name in layer.operands)]
        inputs += [NEW_LENGTHS] if first.packed else []
        outputs, parts = [layer.output for layer in self.layers], [layer.parts for layer in self.layers]
        node = helper.make_node(OP, inputs, outputs, first.nodes[-1].name, domain=DOMAIN)
        for name, numbers in {"widths": self.widths, "parts": parts}.items():
            node.attribute.append(helper.make_attribute(name, numbers))
        node.metadata_props.extend(first.nodes[-1].metadata_props)
        return node


class _LayerFinder:
    """Finds the layers of a graph to which low-rank pairs are added."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self._makers = {name: node for node in self.nodes for name in node.output}
        self._places = {id(node): place for place, node in enumerate(self.nodes)}
        self._all_nodes = list(walk_nodes(graph))
        self._uses = Counter(name for node in self._all_nodes for name in node.input)
        self._uses.update(value.name for value in graph.output)
        self._packed_rows = {node.input[0]: node.output[0] for node in self.nodes if _gathers(node, FROM_ROWS)}
        values = (*graph.value_info, *graph.input, *graph.output)
        self._shapes = {value.name: shape_of(value) for value in values}
        floats = [value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT]
        self._roles = {name: role for name in floats for path, _, role in [name.rpartition(":")] if path}

    def find_groups(self) -> Iterator[_Group]:
        """Yield the layers of each fused projection, and each other layer alone."""
        layers = [layer for node in self.nodes if (layer := self._find_layer(node)) is not None]
        by_base = {layer.base: layer for layer in layers}
        grouped: set[str] = set()
        for split in self.nodes:
            group = self._join(split, by_base) if split.op_type == "Split" else None
            if group is not None:
                grouped.update(split.output)
                yield group
        for layer in layers:
            width = self._width(layer.output)
            if layer.base not in grouped and width is not None:
                yield _Group(layer.base, [layer], [width], layer.nodes[-1], layer.nodes)

    def narrowable(self, groups: Sequence[_Group]) -> list[_Group]:
        """Return the groups whose factors may be float16, since other ops read no more than their shapes."""
        replaced = {id(node) for group in groups for node in group.replaced}
        others = [node for node in self._all_nodes if id(node) not in replaced and node.op_type != "Shape"]
        read = {name for node in others for name in node.input}
        kept = [group for group in groups if read.isdisjoint(n for layer in group.layers for n in layer.factors)]
        return kept if len(kept) == len(groups) else self.narrowable(kept)

    def _join(self, split: onnx.NodeProto, by_base: dict[str, _Layer]) -> _Group | None:
        """Return the layers whose products a ``Split`` takes apart; None where one op cannot compute them."""
        found = [by_base.get(name) for name in split.output]
        read, widths = {layer.x for layer in found if layer is not None}, list(map(self._width, split.output))
        axis = next((attribute.i for attribute in split.attribute if attribute.name == "axis"), 0)
        sizes = [width for width in widths if width is not None]
        if (
            len(read) != 1
            or axis not in (-1, len(self._shapes.get(split.output[0], ())) - 1)
            or len(sizes) < len(widths)
        ):
            return None
        x = next(iter(read))
        late = x in self._makers and self._places[id(self._makers[x])] > self._places[id(split)]
        if late or any(layer is not None and self._uses[layer.base] > 1 for layer in found):
            return None
        layers = [layer or _Layer(name, name, x) for layer, name in zip(found, split.output, strict=True)]
        replaced = [split, *(node for layer in layers for node in layer.nodes)]
        return _Group(split.input[0], layers, sizes, split, replaced)

    def _width(self, name: str) -> int | None:
        """Return a value's number of features; None where it is not known."""
        last = self._shapes.get(name, ())[-1:]
        return last[0] if last and isinstance(last[0], int) else None

    def _find_layer(self, last: onnx.NodeProto) -> _Layer | None:
        """Return the layer whose output an op computes, ``c∘base + h∘((x·A)∘g)·B``; None for any other op."""
        sums = last.op_type == "Gemm" and len(last.input) == 3 and not last.attribute
        if sums and self._roles.get(last.input[1]) == operands.B:
            return self._complete(last, last.input[2], last.input[0], {operands.B: last.input[1]}, [])
        for base, product in (last.input, reversed(last.input)) if last.op_type == "Add" else ():
            slots, nodes = dict[str, str](), list[onnx.NodeProto]()
            segments = self._take_segments(product, nodes)
            u = self._take("MatMul", operands.B, self._take("Mul", operands.H, segments, slots, nodes), slots, nodes)
            if operands.B in slots:
                return self._complete(last, base, u, slots, nodes)
        return None

    def _take_segments(self, value: str, nodes: list[onnx.NodeProto]) -> str:
        """Return the segments that a value's tokens are taken from, and note the op; the value where there are none."""
        node = self._makers.get(value)
        joined = node is not None and self._uses[value] == 1 and self._width(value) == self._width(node.input[0])
        if node is None or not joined or not (_gathers(node, FROM_SEGMENTS) or node.op_type == "Reshape"):
            return value
        nodes.append(node)
        return node.input[0]

    def _find_packed(self, segments: str) -> str | None:
        """Return the packed form of segments of tokens; None where it is not computed."""
        cut = self._makers.get(segments)
        if cut is None or _gathers(cut, TO_SEGMENTS):
            return None if cut is None else cut.input[0]
        return self._packed_rows.get(cut.input[0]) if cut.op_type == "Reshape" else None

    def _complete(
        self, last: onnx.NodeProto, base: str, u: str, slots: dict[str, str], nodes: list[onnx.NodeProto]
    ) -> _Layer | None:
        """Return a layer from its output's op backwards: u = (x·A)∘g, and the base's product with its scale."""
        packed = any(_gathers(node, FROM_SEGMENTS) for node in nodes)
        x: str | None = self._take("MatMul", operands.A, self._take("Mul", operands.G, u, slots, nodes), slots, nodes)
        x = self._find_packed(x) if packed and x is not None else x
        if x is None:
            return None
        base = self._take("Mul", operands.C, base, slots, nodes)
        output, base_shape, x_shape = (self._shapes.get(name, ()) for name in (last.output[0], base, x))
        if operands.A not in slots or not _agree(output, base_shape) or not _agree(output[:-1], x_shape[:-1]):
            return None
        scales = [role for role in _SCALES if role in slots]
        parts = _PAIR + sum(_SCALES[role] for role in scales)
        ordered = [slots[role] for role in (operands.A, operands.B, *scales)]
        return _Layer(last.output[0], base, x, parts, ordered, packed, [*reversed(nodes), last])

    def _take(self, op: str, role: str, value: str, slots: dict[str, str], nodes: list[onnx.NodeProto]) -> str:
        """Return what a value is computed from by an op with a slot, and note both; the value where it is not."""
        node = self._makers.get(value)
        if node is None or node.op_type != op or self._uses[value] != 1:
            return value
        sides = (node.input,) if op == "MatMul" else (node.input, reversed(node.input))
        for operand, slot in sides:
            if self._roles.get(slot) == role:
                slots[role] = slot
                nodes.append(node)
                return operand
        return value


def _gathers(node: onnx.NodeProto, indices: str) -> bool:
    """Return whether an op takes tokens by such indices."""
    return node.op_type == "GatherND" and node.input[1] == indices


def _agree(shape: Shape, other: Shape) -> bool:
    """Return whether shapes are known and equal as far as they are fixed: sizes of one meaning may have two names."""
    pairs = list(zip(shape, other, strict=False))
    fixed = all(one == two for one, two in pairs if isinstance(one, int) or isinstance(two, int))
    return fixed and bool(shape) and len(shape) == len(other)
