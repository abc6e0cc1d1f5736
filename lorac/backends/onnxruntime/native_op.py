"""The op of the package lorac-native, which replaces the ops of low-rank pairs when a session is created.

A pair costs three ops: two products with matrices that are inputs, and a sum. For a row of one token, each op takes
longer to start than to compute. ``lorac.native::AddLowRank`` replaces all of them, for all layers of a fused projection
at once, whose outputs it writes separately as ``Split`` would. If tokens are packed (``packing``), it reads the number
of each row's tokens, so they need not be padded for it. It also adds a residual to its sum, and gives attention its
queries, keys and values as one value.

A saved program has only standard ops, so it runs everywhere. It is rewritten as a protobuf message when it is loaded,
since importing onnxscript would take a quarter of an artifact's loading time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
from onnx import NodeProto, TensorProto, helper

from lorac.backends.onnx.model_files import walk_nodes
from lorac.backends.onnxruntime.leading_axes import (
    GraphIndex,
    Shape,
    read_axis,
    remove_unused,
    replace_nodes,
    restore_leading_axes,
)
from lorac.ir.algebra import operands
from lorac.ir.graph.attention_ops import NEW_LENGTHS
from lorac.native_library import OP_VERSION

DOMAIN, OP = "lorac.native", "AddLowRank"
TO_SEGMENTS, FROM_SEGMENTS = "lorac.to_segments", "lorac.from_segments"
"""The indices by which packed tokens (``packing``) become those of segments, and segments' tokens packed."""
FROM_ROWS, TO_ROWS = "lorac.from_rows", "lorac.to_rows"
"""The indices by which tokens of padded rows are packed, and packed tokens become those of padded rows."""
_PARTS = {operands.A: 1, operands.B: 0, operands.G: 2, operands.H: 4, operands.C: 8}
"""Operand -> its bit in the attribute ``parts``, in the order of the op's inputs; a pair has one bit."""
_RESIDUAL = 16
"""The bit of a layer with a residual, an input after its operands."""
_ATTENTION = "GroupQueryAttention"


def use_native_op(model: onnx.ModelProto, *, half: bool = False) -> int:
    """Replace the ops of low-rank pairs by the op of lorac-native.

    Args:
        model: the model, edited in place.
        half: whether slots of pairs become float16 inputs.

    Returns:
        The number of layers that the op computes.
    """
    finder = _LayerFinder(model.graph)
    groups = list(finder.find_groups())
    groups = _narrowable(model.graph, groups) if half else groups
    if not groups:
        return 0
    groups = [finder.join_attention(finder.add_residual(group)) for group in groups]
    ops = {id(group.replaced[0]): (group.op, *group.after) for group in groups}
    removed = {id(node) for group in groups for node in group.replaced}
    kept = (node for node in finder.index.nodes if id(node) in ops or id(node) not in removed)
    replace_nodes(model.graph, [made for node in kept for made in ops.get(id(node), (node,))])
    model.opset_import.add(domain=DOMAIN, version=OP_VERSION)
    restore_leading_axes(model.graph, DOMAIN)
    remove_unused(model.graph)
    if half:
        factors = {name for group in groups for name in group.factors}
        for value in (value for value in model.graph.input if value.name in factors):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
        for tensor in (tensor for tensor in model.graph.initializer if tensor.name in factors):  # their defaults
            narrow = onnx.numpy_helper.to_array(tensor).astype("float16")
            tensor.CopyFrom(onnx.numpy_helper.from_array(narrow, tensor.name))
    return sum(bool(layer.slots) for group in groups for layer in group.layers)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer whose base product and low-rank pair are added.

    Attributes:
        output, base, x: the names of its output, of the value to which the pair is added, and of its input.
        slots: operand -> slot; empty for a layer without an adapter, whose output equals its base.
        packed: whether x and base are packed tokens, of which rows have different numbers.
        nodes: the ops that compute the output from base and x, in reverse order.
    """

    output: str
    base: str
    x: str
    slots: Mapping[str, str]
    packed: bool = False
    nodes: Sequence[NodeProto] = ()


@dataclass(frozen=True, eq=False)
class _Group:
    """Layers that one op computes.

    Attributes:
        op: the op.
        layers: the layers, in the order of the op's outputs.
        replaced: the nodes that the op replaces. It takes the position of the first, which is computed last or precedes
            all readers.
        after: ops on its output, which follow it.
    """

    op: NodeProto
    layers: Sequence[_Layer]
    replaced: Sequence[NodeProto]
    after: Sequence[NodeProto] = ()

    @property
    def factors(self) -> set[str]:
        """The slots of pairs."""
        return {layer.slots[role] for layer in self.layers if layer.slots for role in (operands.A, operands.B)}


def _narrowable(graph: onnx.GraphProto, groups: Sequence[_Group]) -> list[_Group]:
    """Return the groups whose factors may be float16, since other ops read at most their shapes."""
    replaced = {id(node) for group in groups for node in group.replaced}
    others = (node for node in walk_nodes(graph) if id(node) not in replaced and node.op_type != "Shape")
    read = {name for node in others for name in node.input}
    kept = [group for group in groups if read.isdisjoint(group.factors)]
    return kept if len(kept) == len(groups) else _narrowable(graph, kept)


class _LayerFinder:
    """A search for the layers of a graph to which low-rank pairs are added."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.index = GraphIndex(graph)
        self._places = {id(node): place for place, node in enumerate(self.index.nodes)}
        floats = [value.name for value in graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT]
        self._roles = {name: role for name in floats for path, _, role in [name.rpartition(":")] if path}

    def find_groups(self) -> Iterator[_Group]:
        """Yield the layers of each fused projection together, and every other layer alone."""
        layers = [layer for node in self.index.nodes if (layer := self._find_layer(node)) is not None]
        by_base = {layer.base: layer for layer in layers}
        grouped: set[str] = set()
        for split in self.index.nodes:
            group = self._join(split, by_base) if split.op_type == "Split" else None
            if group is not None:
                grouped.update(split.output)
                yield group
        for layer in layers:
            group = None if layer.base in grouped else self._group(layer.base, [layer], layer.nodes)
            if group is not None:
                yield group

    def _join(self, split: NodeProto, by_base: Mapping[str, _Layer]) -> _Group | None:
        """Return the layers whose products a ``Split`` separates; None if one op cannot compute them together."""
        found, index = [by_base.get(name) for name in split.output], self.index
        read = {layer.x for layer in found if layer is not None}
        rank = len(index.shapes.get(split.output[0], ()))
        if len(read) != 1 or (read_axis(split) or 0) not in (-1, rank - 1):
            return None
        x = next(iter(read))
        late = x in index.makers and self._places[id(index.makers[x])] > self._places[id(split)]
        if late or any(layer is not None and index.uses[layer.base] > 1 for layer in found):
            return None
        layers = [layer or _Layer(name, name, x, {}) for layer, name in zip(found, split.output, strict=True)]
        return self._group(split.input[0], layers, [split, *(node for layer in layers for node in layer.nodes)])

    def _group(self, base: str, layers: Sequence[_Layer], replaced: Sequence[NodeProto]) -> _Group | None:
        """Return layers with the op that adds their pairs to one product; None if a number of features is dynamic."""
        widths = [(self.index.shapes.get(layer.output) or ("",))[-1] for layer in layers]
        if not all(isinstance(width, int) for width in widths):
            return None
        first = next(layer for layer in layers if layer.slots)
        inputs = [first.x, base, *(layer.slots[role] for layer in layers for role in _PARTS if role in layer.slots)]
        inputs += [NEW_LENGTHS] if first.packed else []
        op = helper.make_node(OP, inputs, [layer.output for layer in layers], first.nodes[0].name, domain=DOMAIN)
        parts = [sum(_PARTS[role] for role in layer.slots) for layer in layers]
        op.attribute.extend(helper.make_attribute(*pair) for pair in (("widths", widths), ("parts", parts)))
        op.metadata_props.extend(first.nodes[0].metadata_props)
        return _Group(op, layers, replaced)

    def add_residual(self, group: _Group) -> _Group:
        """Return a group of one layer whose op also adds the value that an ``Add`` adds to the layer's output."""
        (layer, *others), index = group.layers, self.index
        add = next(iter(index.readers[layer.output]), None)
        if others or add is None or add.op_type != "Add" or index.uses[layer.output] != 1:
            return group
        residual = next(name for name in add.input if name != layer.output)
        shape = index.shapes.get(layer.output, ())
        if not shape or not all(shape) or index.shapes.get(residual) != shape:
            return group
        op, (output,) = NodeProto(), add.output
        op.CopyFrom(group.op)
        op.input.insert(len(op.input) - layer.packed, residual)
        op.output[0] = output
        next(each for each in op.attribute if each.name == "parts").ints[0] |= _RESIDUAL
        return replace(group, op=op, replaced=[add, *group.replaced])

    def join_attention(self, group: _Group) -> _Group:
        """Return a group whose op computes an attention's queries, keys and values as one value, of packed tokens."""
        index, outputs, op = self.index, [layer.output for layer in group.layers], NodeProto()
        attention = next(iter(index.readers[outputs[0]]), None)
        once = all(index.uses[name] == 1 for name in outputs)
        if attention is None or attention.op_type != _ATTENTION or not once or list(attention.input[:3]) != outputs:
            return group
        joined, after = f"{outputs[0]}_joined", list[NodeProto]()
        attention.input[0], attention.input[1], attention.input[2] = joined, "", ""
        op.CopyFrom(group.op)
        del op.output[:]
        op.output.append(joined)
        cut, padded = (index.makers.get(name) for name in op.input[:2])
        if cut is not None and padded is not None and _gathers(cut, TO_SEGMENTS) and _gathers(padded, TO_ROWS):
            op.input[0], op.input[1], op.output[0] = cut.input[0], padded.input[0], f"{joined}_packed"
            op.input.append(NEW_LENGTHS)
            after.append(helper.make_node("GatherND", [op.output[0], TO_ROWS], [joined]))
        return replace(group, op=op, after=after)

    def _find_layer(self, last: NodeProto) -> _Layer | None:
        """Return the layer whose output an op computes as ``c∘base + h∘((x·A)∘g)·B``; None for any other op."""
        if last.op_type == "Gemm" and len(last.input) == 3 and not last.attribute:
            u, slot, base = last.input
            return self._complete(base, u, {operands.B: slot}, [last]) if self._roles.get(slot) == operands.B else None
        for base, product in (last.input, reversed(last.input)) if last.op_type == "Add" else ():
            slots, nodes = dict[str, str](), [last]
            scaled = self._take_segments(product, nodes)
            u = self._take("MatMul", operands.B, self._take("Mul", operands.H, scaled, slots, nodes), slots, nodes)
            if operands.B in slots:
                return self._complete(base, u, slots, nodes)
        return None

    def _complete(self, base: str, u: str, slots: dict[str, str], nodes: list[NodeProto]) -> _Layer | None:
        """Complete a layer from its second product backwards: u = (x·A)∘g, and the base's product with its scale."""
        x = self._take("MatMul", operands.A, self._take("Mul", operands.G, u, slots, nodes), slots, nodes)
        product = self._take("Mul", operands.C, base, slots, nodes)
        packed = any(_gathers(node, FROM_SEGMENTS) for node in nodes)
        if packed:  # then x is cut into segments: the op reads its packed form
            cut, x = self.index.makers.get(x), ""
            if cut is not None and _gathers(cut, TO_SEGMENTS):
                x = cut.input[0]
            elif cut is not None and cut.op_type == "Reshape":
                gathers = (node for node in self.index.readers[cut.input[0]] if _gathers(node, FROM_ROWS))
                x = next((node.output[0] for node in gathers), "")
        layer = _Layer(nodes[0].output[0], product, x, slots, packed, nodes)
        y_shape, base_shape, x_shape = (self.index.shapes.get(n, ()) for n in (layer.output, layer.base, layer.x))
        fits = _agree(y_shape, base_shape) and _agree(y_shape[:-1], x_shape[:-1])
        return layer if operands.A in slots and fits else None

    def _take(self, op: str, role: str, value: str, slots: dict[str, str], nodes: list[NodeProto]) -> str:
        """Return the operand from which an op with a slot computes a value, and record both; else return the value."""
        node = self.index.makers.get(value)
        if node is None or node.op_type != op or self.index.uses[value] != 1:
            return value
        sides = (node.input,) if op == "MatMul" else (node.input, reversed(node.input))
        for operand, slot in sides:
            if self._roles.get(slot) == role:
                slots[role] = slot
                nodes.append(node)
                return operand
        return value

    def _take_segments(self, value: str, nodes: list[NodeProto]) -> str:
        """Return the segments from which a value's tokens are gathered, and record the op; else return the value."""
        node = self.index.makers.get(value)
        if node is None or self.index.uses[value] != 1:
            return value
        widths = {self.index.shapes.get(name, ())[-1:] for name in (value, node.input[0])}
        if len(widths) > 1 or not (_gathers(node, FROM_SEGMENTS) or node.op_type == "Reshape"):
            return value
        nodes.append(node)
        return node.input[0]


def _gathers(node: NodeProto, indices: str) -> bool:
    """Return whether an op gathers tokens by the given indices."""
    return node.op_type == "GatherND" and node.input[1] == indices


def _agree(shape: Shape, other: Shape) -> bool:
    """Return whether shapes are known and all fixed sizes agree; names of equal dynamic sizes may differ."""
    pairs = zip(shape, other, strict=False)
    fixed = all(one == two for one, two in pairs if isinstance(one, int) or isinstance(two, int))
    return fixed and bool(shape) and len(shape) == len(other)
