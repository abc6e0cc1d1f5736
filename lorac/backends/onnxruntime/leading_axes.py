"""Removal of rows: values get their leading axes back if no op needs rows any more.

``FlattenToRows`` moves onto rows all ``Gemm`` ops and products with slots, and all row-wise ops between them. After the
native op has replaced the products, all ops there accept any leading axes, and each change of shape costs an op.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from lorac.backends.onnx.model_files import walk_nodes, walk_subgraphs

ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Exp", "Erf", "Sqrt", "Tanh", "Sigmoid", "Relu", "Gelu", "Identity")
)
AXIS_OPS = {"LayerNormalization": -1, "SimplifiedLayerNormalization": -1, "Split": 0}
"""Op -> the axis it acts along by default; it acts on each row alone where that is the last axis."""
Shape = tuple[int | str, ...]
_MATRIX = 2


class GraphIndex:
    """The nodes and values of a graph by name.

    Attributes:
        nodes: the graph's own nodes.
        makers: value -> the node that computes it.
        readers: value -> the graph's own nodes that read it.
        uses: value -> the number of its readers, including nodes of nested graphs and outputs.
        stored: the initializers.
        shapes: the shapes of values, where known.
        fixed: inputs, outputs and initializers, and values that nested graphs read.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.makers = {name: node for node in self.nodes for name in node.output}
        self.readers = defaultdict[str, list[NodeProto]](list)
        for node in self.nodes:
            for name in node.input:
                self.readers[name].append(node)
        nested = [name for part in walk_subgraphs(graph) for node in part.node for name in node.input]
        outputs = [value.name for value in graph.output]
        self.uses = Counter([*nested, *outputs, *(name for node in self.nodes for name in node.input)])
        self.stored = {tensor.name: tensor for tensor in graph.initializer}
        self.fixed = {*self.stored, *nested, *outputs, *(value.name for value in graph.input)}
        self.shapes: dict[str, Shape] = {
            value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in (*graph.value_info, *graph.input, *graph.output)
            if value.type.tensor_type.HasField("shape")
        }
        self.shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def restore_leading_axes(graph: onnx.GraphProto, domain: str) -> None:
    """Compute values on rows with their leading axes if all ops on them allow it, and remove the changes of shape.

    Args:
        graph: the graph, edited in place.
        domain: the domain of the native op, whose first two inputs and residual may have any leading axes.
    """
    index, regions, names = GraphIndex(graph), list[_Region](), dict[str, str]()
    for node in index.nodes:
        if node.domain == domain and not any(id(node) in region.nodes for region in regions):
            regions.append(_Region(index, domain, node))
    for region in regions:
        names |= region.edit(graph) if region.fits else {}
    for node in walk_nodes(graph):
        for place in range(len(node.input)):
            while (name := node.input[place]) in names:
                node.input[place] = names[name]


class _Region:
    """Connected row-wise ops, which read each other's values.

    Args:
        index: the index of the graph.
        domain: the domain of the native op.
        start: one of the ops.

    Attributes:
        nodes, values: the ops by id, and the names of their values on rows.
        entries, exits: the ``Reshape`` ops that put values on rows, and that read values on rows.
        leading: the leading axes of the values before they were put on rows.
        fits: whether the leading axes are known, every op accepts them, and no exit copies a size of rows.
    """

    def __init__(self, index: GraphIndex, domain: str, start: NodeProto) -> None:
        self.index, self.domain = index, domain
        self.nodes, self.values = set[int](), set[str]()
        self.entries, self.exits = list[NodeProto](), list[NodeProto]()
        self.leading: Shape = ()
        self.fits = self._grow(start)

    def _grow(self, start: NodeProto) -> bool:
        """Add all nodes that are connected with an op, and find their leading axes; return whether these fit."""
        todo = [start]
        while todo:
            node = todo.pop()
            if id(node) in self.nodes:
                continue
            self.nodes.add(id(node))
            operands = self._operands(node)
            found = {*operands, *node.output} - self.values
            if not operands or not found.isdisjoint(self.index.fixed):
                return False
            self.values |= found
            for name in found:
                maker = self.index.makers[name]
                (self.entries if maker.op_type == "Reshape" else todo).append(maker)
                for reader in self.index.readers[name]:
                    is_exit = reader.op_type == "Reshape" and reader.input[0] == name
                    (self.exits if is_exit else todo).append(reader)
        shapes = self.index.shapes
        sources = [(shapes.get(node.input[0], ()), shapes.get(node.output[0], ())) for node in self.entries]
        self.leading = next((full[:-1] for full, rows in sources if full[-1:] == rows[-1:]), ())
        count = len(self.leading)
        same = all(full[:count] == self.leading and _size(full[count:]) == _size(rows[-1:]) for full, rows in sources)
        known = all(self.leading) and all(rows and isinstance(rows[-1], int) for _, rows in sources)
        read = (self.index.stored.get(node.input[1]) for node in self.exits)
        copies = any(sizes is not None and 0 in numpy_helper.to_array(sizes) for sizes in read)
        return bool(count and same and known) and not copies

    def _operands(self, node: NodeProto) -> list[str]:
        """Return the inputs of an op that have leading axes; an empty list if the op does not accept any."""
        names, shapes = list(filter(None, node.input)), self.index.shapes
        if node.domain == self.domain:
            return [*names[:2], *(name for name in names[2:] if name not in self.index.fixed)]  # and a residual
        if node.op_type == "MatMulNBits" or (node.op_type == "MatMul" and len(shapes.get(names[1], ())) == _MATRIX):
            return names[:1]
        if node.op_type in AXIS_OPS:
            axis = read_axis(node)
            return names[:1] if (AXIS_OPS[node.op_type] if axis is None else axis) == -1 else []
        if node.op_type not in ELEMENTWISE:
            return []
        return [name for name in names if name not in shapes or len(shapes[name]) > 1]  # others are broadcast

    def edit(self, graph: onnx.GraphProto) -> dict[str, str]:
        """Give values their leading axes; return unnecessary value -> its replacement."""
        shapes, names, count = self.index.shapes, dict[str, str](), len(self.leading)
        outputs = {value.name for value in graph.output}
        full = {name: (*self.leading, *shapes.get(name, ("",))[-1:]) for name in self.values}
        for node in self.entries:
            (source, *_), (made,) = node.input, node.output
            if shapes[source] == full[made]:
                names[made] = source
            else:
                self._copy_leading(graph, node, full[made][-1:])
        for node in self.exits:
            (source, *_), (made,) = node.input, node.output
            if made not in outputs and shapes.get(made) == full[source]:
                names[made] = source
            elif shapes.get(made, ())[:count] == self.leading:
                self._copy_leading(graph, node, shapes[made][count:])
        for value in (value for value in graph.value_info if value.name in full):
            sizes = [size or None for size in full[value.name]]
            value.CopyFrom(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, sizes))
        return names

    def _copy_leading(self, graph: onnx.GraphProto, reshape: NodeProto, rest: Shape) -> None:
        """Make a ``Reshape`` copy the leading sizes of its input if the remaining sizes are fixed."""
        if _size(rest) is None:
            return
        name = "_".join(map(str, (f"leading_{len(self.leading)}", *rest)))
        if all(tensor.name != name for tensor in graph.initializer):
            sizes = np.array([*(0 for _ in self.leading), *rest], np.int64)
            graph.initializer.append(numpy_helper.from_array(sizes, name))
        reshape.input[1] = name
        del reshape.attribute[:]  # ``allowzero``, with which a 0 would not copy


def remove_unused(graph: onnx.GraphProto) -> None:
    """Remove ops whose values nothing reads, and these values' shapes."""
    used = {value.name for value in graph.output}
    used.update(name for part in walk_subgraphs(graph) for node in part.node for name in node.input)
    kept = list[NodeProto]()
    for node in reversed(graph.node):
        if not used.isdisjoint(node.output):
            used.update(node.input)
            kept.append(node)
    replace_nodes(graph, kept[::-1])
    for place in reversed(range(len(graph.value_info))):
        if graph.value_info[place].name not in used:
            del graph.value_info[place]


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[NodeProto]) -> None:
    """Replace all nodes of a graph by copies of the given nodes, which may belong to the graph."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def read_axis(node: NodeProto) -> int | None:
    """Return the axis attribute of an op, or None."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)


def _size(shape: Shape) -> int | None:
    """Return the number of elements in a part of a shape; None if it is not fixed."""
    sizes = [size for size in shape if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(shape) else None
