"""Passes that compute on rows: from a slot's first product onward, (…, features) is computed as (rows, features).

ONNX Runtime multiplies one matrix faster than a stack of matrices, and its ``Gemm`` adds a product to another value
without a separate op. Ops that act on each row alone (sums, scales, norms) stay on rows too; all others get the full
shape. If slots have places (``lorac.ir.slots.places``), segments (places, rows, features) take the role of rows.
"""

import functools
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lorac.backends.onnx.model_files import PACKED_KEY
from lorac.backends.onnx.passes import OnnxPass, copy_node, module_around, number_constant, read_numbers
from lorac.backends.onnxruntime.leading_axes import AXIS_OPS, ELEMENTWISE
from lorac.ir.graph.graph import Skip
from lorac.ir.graph.passes import PassResult

_MATRIX = 2


@dataclass(frozen=True)
class FlattenToRows(OnnxPass):
    """Move the ops that follow a slot's product onto rows, and add slots' products by ``Gemm``."""

    name: ClassVar[str] = "flatten-to-rows"

    def apply(self, model: ir.Model) -> PassResult:
        """Edit the model in place; report slots' products that no ``Gemm`` adds."""
        packed = PACKED_KEY in model.metadata_props  # then products with places are separate from all others
        changed = _Flattener(model.graph, None if packed else _Segments.of(model.graph)).run()
        slots = set(model.graph.inputs)
        for node in list(model.graph):
            if node.op_type == "Add":
                changed |= _add_by_product(model.graph, node, slots)
        RemoveUnusedNodesPass()(model)
        products = [n for n in model.graph if n.op_type == "MatMul" and n.inputs[1] in slots]
        by_product = {node.outputs[0] for node in products}
        left = [n for n in products if n.inputs[0] in by_product and _rank(n.inputs[1]) == _MATRIX]  # (x·A)·B
        why = "its product is not added to rows of one shape"
        return PassResult(changed, tuple(dict.fromkeys(Skip(module_around(node), why) for node in left)))


@dataclass(frozen=True)
class CopyReshapeSizes(OnnxPass):
    """Make a ``Reshape`` copy unchanged sizes from its input, instead of computing them by other ops."""

    name: ClassVar[str] = "copy-reshape-sizes"

    def apply(self, model: ir.Model) -> PassResult:
        changed = False
        for reshape in [node for node in model.graph.all_nodes() if node.op_type == "Reshape"]:
            x, made, sizes = reshape.inputs[0], reshape.outputs[0].shape, reshape.inputs[1]
            if x is None or x.shape is None or sizes is None or made is None or read_numbers(sizes):
                continue
            copied = set[int]()
            for place, (size, other) in enumerate(zip(made, x.shape, strict=False)):
                if isinstance(size, ir.SymbolicDim) and size.value is not None and size == other:
                    copied.add(place)
            numbers = [0 if place in copied else size for place, size in enumerate(made)]
            known = [size for i, size in enumerate(numbers) if isinstance(size, int) and (size > 0 or i in copied)]
            if len(known) == len(numbers):  # every size is a number or copied
                reshape.attributes.pop("allowzero", None)
                reshape.replace_input_with(1, number_constant(model.graph, known))
                changed = True
        RemoveUnusedNodesPass()(model)
        return PassResult(changed)


@dataclass(frozen=True)
class _RowMatrix:
    """A value (…, features) as a matrix; ``full`` is a value with the same leading dimensions."""

    matrix: ir.Value
    full: ir.Value

    @functools.cached_property
    def leading(self) -> str:
        """The leading dimensions as text: equal for values whose rows correspond."""
        dims = [] if self.full.shape is None else [getattr(dim, "value", dim) for dim in self.full.shape[:-1]]
        return "_".join(str(dim) for dim in dims) if None not in dims else str(self.full.name)


class _Flattener:
    """One run of the pass over a graph.

    Args:
        graph: the graph, edited in place.
        segments: its cuts into segments; None if no slot has places.

    Attributes:
        adapted: values that a slot's product reads.
        rows: values that have a form on rows so far.
        first, sizes, shapes: the value in which leading dimensions first occur, the value of their sizes, and of full
            shapes.
        changed: whether any ``Reshape`` now reads rows.
    """

    def __init__(self, graph: ir.Graph, segments: "_Segments | None") -> None:
        self.graph, self.segments, slots = graph, segments, set(graph.inputs)
        products = [node for node in graph if node.op_type == "MatMul" and node.inputs[1] in slots]
        self.adapted = {node.inputs[0] for node in products if _rank(node.inputs[1]) == _MATRIX}
        self.adapted |= set() if self.segments is None else {cut.inputs[0] for cut in self.segments.cuts}
        self.rows: dict[ir.Value, _RowMatrix] = {}
        self.first: dict[str, ir.Value] = {}
        self.sizes: dict[str, ir.Value] = {}
        self.shapes: dict[tuple[str, object], ir.Value] = {}
        self.changed = False

    def run(self) -> bool:
        """Move the nodes; return whether the graph changed."""
        moved = [node for node in list(self.graph) if self._moves(node)]
        for node in reversed(moved):
            for value in [value for value in node.outputs if value.uses() or value.is_graph_output()]:
                self._restore(value)
            self.graph.remove(node, safe=True)
        return self.changed or bool(moved)

    def _moves(self, node: ir.Node) -> bool:
        """Add a copy of a node on rows if it acts on each row alone; return whether it was added."""
        first = node.inputs[0] if node.inputs else None
        if self.segments is not None and first is not None and node.op_type == "Reshape":
            if node in self.segments.cuts:  # its segments are recorded, or those that the value already has are used
                segments = node.outputs[0]
                if first in self.rows:
                    segments.replace_all_uses_with(self.rows[first].matrix)
                    return True
                if first.shape is not None and segments.shape is not None and first.shape[-1] == segments.shape[-1]:
                    self._note(first, _RowMatrix(segments, first))
                made = first.producer()
                if made is not None and made.op_type == "Reshape" and made.inputs[0] is not None:
                    node.replace_input_with(0, made.inputs[0])
                return False
            if self.segments.joins(node):
                value = node.outputs[0]
                full = self.first.get(_RowMatrix(first, value).leading)
                self._note(value, _RowMatrix(first, value if full is None else full))
                return full is not None  # then it is joined again at its readers
        if node.op_type == "Reshape" and first in self.rows:
            copies = not node.attributes.get_int("allowzero", 0) and 0 in read_numbers(node.inputs[1])
            if not copies:  # a 0 copies a size of its input, which differs on rows
                node.replace_input_with(0, self.rows[first].matrix)
                self.changed = True
                return False
        operands = self._operands(node)
        begins = node.op_type == "MatMul" and first in self.adapted
        if not operands or not (begins or any(value in self.rows for value in operands)):
            return False
        found = {value: rows for value in operands if (rows := self._rows_of(value)) is not None}
        if any(value not in found for value in operands) or len({rows.leading for rows in found.values()}) != 1:
            return False
        self._add_twin(node, found)
        return True

    def _note(self, value: ir.Value, rows: _RowMatrix) -> None:
        self.rows[value] = rows
        self.first.setdefault(rows.leading, value)

    def _operands(self, node: ir.Node) -> list[ir.Value]:
        """Return the inputs of a row-wise op that can be on rows; an empty list for other ops."""
        values = [value for value in node.inputs if value is not None]
        if node.op_type == "MatMul":
            return values[:1] if _rank(values[1]) == _MATRIX and self._has_rows(values[0]) else []
        if node.op_type in AXIS_OPS:
            axis = node.attributes.get_int("axis", AXIS_OPS[node.op_type])
            last = axis in (-1, (_rank(values[0]) or 0) - 1)
            return values[:1] if last and self._has_rows(values[0]) else []
        if node.op_type not in ELEMENTWISE:
            return []
        full = [value for value in values if _rank(value) not in (0, 1)]
        return full if all(self._has_rows(value) for value in full) else []

    def _has_rows(self, value: ir.Value) -> bool:
        return value in self.rows or (_rank(value) or 0) > 2

    def _rows_of(self, value: ir.Value) -> _RowMatrix | None:
        """Return a value on rows, reshaped if necessary; None if its features or its segments are unknown."""
        if value in self.rows or value.shape is None:
            return self.rows.get(value)
        features = value.shape[-1]
        if not isinstance(features, int) or (self.segments is not None and not self.segments.fit(value.shape)):
            return None
        producer = value.producer()
        reshaped = producer.inputs[0] if producer is not None and producer.op_type == "Reshape" else None
        flat = number_constant(self.graph, [-1, features])
        shape = flat if self.segments is None else self.segments.shape(flat)
        reshape = ir.Node("", "Reshape", [reshaped or value, shape])
        self._insert(value, reshape)
        self._note(value, _RowMatrix(reshape.outputs[0], value))
        self._describe(reshape.outputs[0], value, self.rows[value])
        return self.rows[value]

    def _add_twin(self, node: ir.Node, rows: dict[ir.Value, _RowMatrix]) -> None:
        full = next(iter(rows.values())).full
        inputs = [rows[value].matrix if value in rows else value for value in node.inputs]
        attributes = [ir.AttrInt64("axis", -1) if a.name == "axis" else a for a in node.attributes.values()]
        twin = copy_node(node, inputs, attributes)
        self.graph.insert_before(node, twin)
        for old, new in zip(node.outputs, twin.outputs, strict=True):
            new.name = f"{old.name}_rows"
            self.rows[old] = _RowMatrix(new, full)
            self._describe(new, old, self.rows[old])

    def _describe(self, matrix: ir.Value, value: ir.Value, rows: _RowMatrix) -> None:
        features = value.shape[-1] if value.shape is not None else None
        places = [] if self.segments is None else [self.segments.places]
        matrix.shape, matrix.type = ir.Shape([*places, f"rows_{rows.leading}", features]), value.type or rows.full.type

    def _restore(self, value: ir.Value) -> None:
        """Give remaining readers of a moved value the full shape, at the position of the op that computed it."""
        rows, moved = self.rows[value], value.producer()
        assert moved is not None
        features, read = None if value.shape is None else value.shape[-1], list[ir.Node]()
        leading, axis = self._leading_sizes(rows), [ir.AttrInt64("axis", 0)]
        key = (rows.leading, features)
        if not isinstance(features, int):
            last = ir.Node("", "Shape", [rows.matrix], [ir.AttrInt64("start", -1)])
            read = [last, ir.Node("", "Concat", [leading, last.outputs[0]], axis)]
        elif key not in self.shapes:  # computed once for all values that have it
            whole = ir.Node("", "Concat", [leading, number_constant(self.graph, [features])], axis)
            self._insert(leading, whole)
            self.shapes[key] = whole.outputs[0]
        reshape = ir.Node("", "Reshape", [rows.matrix, read[-1].outputs[0] if read else self.shapes[key]])
        # Not directly after the matrix, which may precede the value whose sizes are read.
        self.graph.insert_before(moved, [*read, reshape])
        restored = reshape.outputs[0]
        restored.shape, restored.type, restored.name = value.shape, value.type, value.name
        value.name = None
        value.replace_all_uses_with(restored, replace_graph_outputs=True)

    def _leading_sizes(self, rows: _RowMatrix) -> ir.Value:
        """Return all sizes except the last, read from the value in which they first occur."""
        if rows.leading not in self.sizes:
            first = self.first[rows.leading]
            shape = ir.Node("", "Shape", [first], [ir.AttrInt64("end", -1)])
            self._insert(first, shape)
            self.sizes[rows.leading] = shape.outputs[0]
        return self.sizes[rows.leading]

    def _insert(self, after: ir.Value, *nodes: ir.Node) -> None:
        producer = after.producer()
        if producer is None and self.segments is not None:
            producer = self.segments.last
        if producer is None:
            self.graph.insert_before(self.graph[0], nodes)
        else:
            self.graph.insert_after(producer, nodes)


class _Segments:
    """The segments of a graph whose slots have places.

    Attributes:
        places: the size of the axis of places.
        cuts: the ops that cut a value into segments.
        last: the last of the ops at the beginning of the graph that compute the shapes of segments.
    """

    def __init__(self, graph: ir.Graph, slot: ir.Value, cuts: Collection[ir.Node]) -> None:
        assert slot.shape is not None
        self.graph, self.places, self.cuts = graph, slot.shape[0], cuts
        size = ir.Node("", "Shape", [slot], [ir.AttrInt64("start", 0), ir.AttrInt64("end", 1)])
        size.metadata_props.update(next(iter(cuts)).metadata_props)
        graph.insert_before(graph[0], size)
        self._size, self._shapes = size, dict[ir.Value, ir.Value]()
        self._cut_sizes = {str(cut.inputs[0].shape[0]) for cut in cuts if cut.inputs[0] and cut.inputs[0].shape}
        self.last: ir.Node | None = None
        for cut in cuts:
            made = cut.outputs[0].shape
            features = None if made is None else made[-1]
            assert isinstance(features, int)
            cut.replace_input_with(1, self.shape(number_constant(graph, [-1, features])))

    @classmethod
    def of(cls, graph: ir.Graph) -> "_Segments | None":
        """Return the segments of a graph; None if it has none."""
        slots = {cut: slot for cut in graph if (slot := _cutting_slot(cut)) is not None}
        return cls(graph, next(iter(slots.values())), slots.keys()) if slots else None

    def shape(self, flat: ir.Value) -> ir.Value:
        """Return the shape of segments; it is computed once for all values with the same features.

        Args:
            flat: the shape of rows, (-1, features).
        """
        if flat not in self._shapes:
            shape = ir.Node("", "Concat", [self._size.outputs[0], flat], [ir.AttrInt64("axis", 0)])
            self.graph.insert_after(self._size, shape)
            self._shapes[flat] = shape.outputs[0]
            self.last = shape if self.last is None else self.last
        return self._shapes[flat]

    def fit(self, shape: ir.Shape) -> bool:
        """Return whether the first axis is the batch or a multiple of it, so it can be split into segments."""
        return not self._cut_sizes.isdisjoint(str(shape[0]).split("*"))

    def joins(self, node: ir.Node) -> bool:
        """Return whether a ``Reshape`` joins segments into a value with the same features."""
        segments, value = node.inputs[0], node.outputs[0]
        if segments is None or segments.shape is None or value.shape is None or len(segments.shape) != _MATRIX + 1:
            return False
        return bool(segments.shape[0] == self.places and segments.shape[-1] == value.shape[-1])


def _cutting_slot(node: ir.Node) -> ir.Value | None:
    """Return the slot whose number of places a ``Reshape`` uses to cut a value; None for any other op."""
    shape = node.inputs[1].producer() if node.op_type == "Reshape" and node.inputs[1] is not None else None
    size = shape.inputs[0].producer() if shape is not None and shape.op_type == "Concat" and shape.inputs[0] else None
    made = node.outputs[0].shape if size is not None and size.op_type == "Shape" else None
    if size is None or made is None or len(made) != _MATRIX + 1 or size.attributes.get_int("end", 0) != 1:
        return None
    slot = size.inputs[0]
    return slot if slot is not None and slot.is_graph_input() and isinstance(made[-1], int) else None


def _add_by_product(graph: ir.Graph, node: ir.Node, slots: set[ir.Value]) -> bool:
    """Replace ``y + u·B`` by one ``Gemm`` if B is a slot and all are fitting matrices; return whether it did."""
    for y, product in (node.inputs, reversed(node.inputs)):
        made = product.producer() if product is not None else None
        if y is None or product is None or made is None or made.op_type != "MatMul" or made.inputs[1] not in slots:
            continue
        if _rank(product) != 2 or y.shape != product.shape or len(product.uses()) != 1 or product.is_graph_output():
            continue
        summed = ir.Node("", "Gemm", [*made.inputs, y], name=node.name)
        summed.metadata_props.update(made.metadata_props)
        ir.convenience.replace_nodes_and_values(graph, node, [node, made], [summed], node.outputs, summed.outputs)
        return True
    return False


def _rank(value: ir.Value | None) -> int | None:
    """Return a value's rank, or None; a ``Transpose`` without a shape has the rank of its operand."""
    if value is not None and value.shape is None and value.producer() is not None:
        made = value.producer()
        return _rank(made.inputs[0]) if made is not None and made.op_type == "Transpose" else None
    return None if value is None or value.shape is None else len(value.shape)
