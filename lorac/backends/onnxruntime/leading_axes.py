"""Values on rows get their leading axes back where no op needs rows any more.

``FlattenToRows`` moves onto rows what ``Gemm`` and products with slots compute, and all row-wise ops in between. Once
the native op computes in their place, all ops there take any leading axes, and each change of shape costs an op.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

from lorac.backends.onnx.model_files import walk_nodes, walk_subgraphs

ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Pow", "Neg", "Exp", "Erf", "Sqrt", "Tanh", "Sigmoid", "Relu", "Gelu", "Identity")
)
AXIS_OPS = {"LayerNormalization": -1, "SimplifiedLayerNormalization": -1, "Split": 0}
"""Op -> the axis it acts along by default; it acts on each row alone where that is the last axis."""
Shape = tuple[int | str, ...]
_MATRIX = 2


def restore_leading_axes(graph: onnx.GraphProto, domain: str) -> None:
    """Compute values on rows with their leading axes, where all ops on them allow it, and drop the changes of shape.

    Args:
        graph: edited in place.
        domain: of an op whose first two inputs may have any leading axes; the values are those that it reads and makes.
    """
    finder = _RegionFinder(graph, domain)
    names = dict[str, str]()
    for region in finder.find_regions():
        names |= _edit(graph, region)
    if names:
        _rename(graph, names)


@dataclass
class _Region:
    """Row-wise ops that read each other's values.

    Attributes:
        leading: the leading axes of the values before they were put on rows.
        nodes, values: the ops by id, and the names of their values on rows.
        entries, exits: the ``Reshape`` ops that put values on rows, and that read values on rows.
        shapes: of all values known in the graph.
    """

    shapes: Mapping[str, Shape]
    leading: Shape = ()
    nodes: dict[int, onnx.NodeProto] = field(default_factory=dict)
    values: set[str] = field(default_factory=set)
    entries: list[onnx.NodeProto] = field(default_factory=list)
    exits: list[onnx.NodeProto] = field(default_factory=list)

    def full(self, name: str) -> Shape:
        """Return the shape of a value with its leading axes."""
        return (*self.leading, *self.shapes.get(name, ("",))[-1:])


class _RegionFinder:
    """Finds the values of a graph that may have their leading axes back."""

    def __init__(self, graph: onnx.GraphProto, domain: str) -> None:
        self.nodes, self.domain = list(graph.node), domain
        self._makers = {name: node for node in self.nodes for name in node.output}
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._fixed = {*self._stored, *(value.name for value in (*graph.input, *graph.output))}
        self._readers = defaultdict[str, list[onnx.NodeProto]](list)
        for node in self.nodes:
            for name in node.input:
                self._readers[name].append(node)
        self._fixed.update(name for part in walk_subgraphs(graph) for node in part.node for name in node.input)
        values = (*graph.value_info, *graph.input, *graph.output)
        self.shapes = {v.name: shape_of(v) for v in values if v.type.tensor_type.HasField("shape")}
        self.shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}

    def find_regions(self) -> list[_Region]:
        """Return the regions in which the op of the domain is."""
        regions, seen = list[_Region](), set[int]()
        for node in self.nodes:
            if node.domain != self.domain or id(node) in seen:
                continue
            region = _Region(self.shapes)
            fits = self._grow(region, node)
            seen |= region.nodes.keys()
            if fits and self._find_leading(region):
                regions.append(region)
        return regions

    def _grow(self, region: _Region, start: onnx.NodeProto) -> bool:
        """Add all that is connected with an op; return whether each op there takes any leading axes."""
        todo = [start]
        while todo:
            node = todo.pop()
            if id(node) in region.nodes:
                continue
            region.nodes[id(node)] = node
            operands = self._operands(node)
            found = {*operands, *node.output} - region.values
            if not operands or not found.isdisjoint(self._fixed):
                return False
            region.values |= found
            todo += [neighbour for name in found for neighbour in self._neighbours(region, name)]
        return True

    def _neighbours(self, region: _Region, name: str) -> list[onnx.NodeProto]:
        """Return the ops that make and read a value; note those that change its shape."""
        maker, found = self._makers[name], list[onnx.NodeProto]()
        (region.entries if maker.op_type == "Reshape" else found).append(maker)
        for reader in self._readers[name]:
            (region.exits if reader.op_type == "Reshape" and reader.input[0] == name else found).append(reader)
        return found

    def _operands(self, node: onnx.NodeProto) -> list[str]:
        """Return the inputs of an op that have leading axes; an empty list for an op that does not take any."""
        names = list(filter(None, node.input))
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), None)
        if node.domain == self.domain:
            return names[:2]
        if node.op_type == "MatMulNBits" or (node.op_type == "MatMul" and self._rank(names[1]) == _MATRIX):
            return names[:1]
        if node.op_type in AXIS_OPS:
            return names[:1] if (AXIS_OPS[node.op_type] if axis is None else axis) == -1 else []
        return [name for name in names if self._rank(name) not in (0, 1)] if node.op_type in ELEMENTWISE else []

    def _rank(self, name: str) -> int | None:
        return len(self.shapes[name]) if name in self.shapes else None

    def _find_leading(self, region: _Region) -> bool:
        """Note the leading axes that all values had; return whether they are known, and no exit copies one of rows."""
        sources = [(self.shapes.get(node.input[0], ()), self.shapes.get(node.output[0], ())) for node in region.entries]
        region.leading = next((full[:-1] for full, rows in sources if full[-1:] == rows[-1:]), ())
        count = len(region.leading)
        same = all(full[:count] == region.leading and _size(full[count:]) == _size(rows[-1:]) for full, rows in sources)
        known = all(region.leading) and all(rows and isinstance(rows[-1], int) for _, rows in sources)
        return bool(count and same and known) and not any(map(self._copies, region.exits))

    def _copies(self, reshape: onnx.NodeProto) -> bool:
        """Return whether a ``Reshape`` may copy a size of what it reads."""
        stored = self._stored.get(reshape.input[1])
        return stored is not None and 0 in numpy_helper.to_array(stored)


def _edit(graph: onnx.GraphProto, region: _Region) -> dict[str, str]:
    """Give values their leading axes; return the names of values that are not needed, with those in their place."""
    names = dict[str, str]()
    for node in region.entries:
        full = region.full(node.output[0])
        if region.shapes[node.input[0]] == full:
            names[node.output[0]] = node.input[0]
        else:
            _copy_leading(graph, node, region.leading, full[-1:])
    outputs = {value.name for value in graph.output}
    for node in region.exits:
        restored, shape = node.output[0], region.shapes.get(node.output[0], ())
        if restored not in outputs and shape == region.full(node.input[0]):
            names[restored] = node.input[0]
        elif shape[: len(region.leading)] == region.leading:
            _copy_leading(graph, node, region.leading, shape[len(region.leading) :])
    for value in graph.value_info:
        if value.name in region.values:
            sizes = [size or None for size in region.full(value.name)]
            value.CopyFrom(helper.make_tensor_value_info(value.name, value.type.tensor_type.elem_type, sizes))
    return names


def _copy_leading(graph: onnx.GraphProto, reshape: onnx.NodeProto, leading: Shape, rest: Shape) -> None:
    """Let a ``Reshape`` copy the leading sizes of its input where the rest is fixed, instead of ops that join sizes."""
    if _size(rest) is None:
        return
    name = "_".join(map(str, (f"leading_{len(leading)}", *rest)))
    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(numpy_helper.from_array(np.array([*(0 for _ in leading), *rest], np.int64), name))
    reshape.input[1] = name
    del reshape.attribute[:]  # ``allowzero``, by which a 0 is not copied


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Let all ops read the values that are in others' places."""
    last = dict(names)
    while chained := {name: last[other] for name, other in last.items() if other in last}:
        last |= chained
    for node in walk_nodes(graph):
        read = [last.get(name, name) for name in node.input]
        del node.input[:]
        node.input.extend(read)


def remove_unused(graph: onnx.GraphProto) -> None:
    """Remove ops whose values nothing reads, and what is noted of such values."""
    used = {value.name for value in graph.output}
    used.update(name for part in walk_subgraphs(graph) for node in part.node for name in node.input)
    kept = list[onnx.NodeProto]()
    for node in reversed(graph.node):
        if not used.isdisjoint(node.output):
            used.update(node.input)
            kept.append(node)
    replace_nodes(graph, kept[::-1])
    for place in reversed(range(len(graph.value_info))):
        if graph.value_info[place].name not in used:
            del graph.value_info[place]


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Make copies of nodes the only ones of a graph, whose own may be among them."""
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _size(shape: Shape) -> int | None:
    """Return how many numbers a part of a shape stands for; None where that is not fixed."""
    sizes = [size for size in shape if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(shape) else None


def shape_of(value: onnx.ValueInfoProto) -> Shape:
    """Return a value's sizes, and the names of those that vary."""
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
