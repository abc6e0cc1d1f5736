"""Positions of tokens in padded rows and in the packed form of ``packing``, computed at the beginning of a graph."""

from collections.abc import Sequence

import onnx_ir as ir

from lorac.backends.onnx.passes import number_constant
from lorac.backends.onnxruntime.native_op import FROM_ROWS, FROM_SEGMENTS, TO_ROWS, TO_SEGMENTS
from lorac.backends.onnxruntime.token_axes import Dim, TokenAxes, dims_of


class TokenIndices:
    """Positions of tokens in the padded and in the packed form, computed at the beginning of a graph.

    Args:
        graph: the graph into which the ops are inserted.
        ids: the padded token ids (batch, length).
        new: the number of tokens in each row.
        slot: an input with an axis of places, if the graph has segments.
    """

    def __init__(self, graph: ir.Graph, ids: ir.Value, new: ir.Value, slot: ir.Value | None) -> None:
        self.graph, self._first, self._tokens = graph, graph[0], dims_of(ids)
        self._joined: dict[tuple[Dim, ...], ir.Value] = {}
        self._repeated: dict[tuple[bool, int], ir.Value] = {}
        batch, length = (self.make("Shape", ids, start=axis, end=axis + 1) for axis in (0, 1))
        self._sizes = dict(zip(self._tokens, (batch, length), strict=True))
        both, zero, one = self.sizes(self._tokens), self.constant(0), self.constant([1])
        assert both is not None
        positions = self.make("Range", zero, self.make("Squeeze", length), self.constant(1))
        counts = self.make("Cast", self.make("Unsqueeze", new, one), to=ir.DataType.INT64)
        self._given = self.make("Less", positions, counts)  # (batch, length), False for padding
        self._row = self.make("Reshape", self._given, self.constant([-1]))
        order = self.make("CumSum", self.make("Cast", self._row, to=ir.DataType.INT64), zero)
        self._places = self.make("Max", self.make("Sub", order, one), zero)  # (batch · length,)
        first = self.make(
            "Pad", self.make("Reshape", self._places, self.constant([-1, 1])), self.constant([0, 1, 0, 0])
        )
        shape = self.make("Concat", both, self.constant([2]), axis=0)
        self._pairs = {False: (self._find(self._given), self.make("Reshape", first, shape))}
        self._pairs[False][0].name, self._pairs[False][1].name = FROM_ROWS, TO_ROWS
        if slot is not None:
            places = self.make("Shape", slot, start=0, end=1)
            cut, shape = (self.make("Concat", places, self.constant(rest), axis=0) for rest in ([-1], [-1, 2]))
            segments = self.make("Reshape", self._row, cut)
            self._pairs[True] = (self._find(segments), self.make("Reshape", first, shape))
            self._pairs[True][0].name, self._pairs[True][1].name = FROM_SEGMENTS, TO_SEGMENTS

    def of_packed(self, axes: TokenAxes) -> ir.Value:
        """Return, for each token of the packed form, its position in a padded value with such axes."""
        return self._pairs[axes.segments][0] if len(axes.axes) == 2 else self._find_items(True, axes.repeats)

    def of_padded(self, axes: TokenAxes) -> ir.Value:
        """Return, for each token of the padded form, its position in the packed form; for padding, any position."""
        return self._pairs[axes.segments][1] if len(axes.axes) == 2 else self._find_items(False, axes.repeats)

    def sizes(self, dims: Sequence[Dim]) -> ir.Value | None:
        """Return the sizes of a padded value; None unless all are numbers or sizes of the ids."""
        key = tuple(dims)
        if key not in self._joined and all(dim in self._sizes or isinstance(dim, int) for dim in dims):
            parts = [self.constant([dim]) if isinstance(dim, int) else self._sizes[dim] for dim in dims]
            self._joined[key] = parts[0] if len(parts) == 1 else self.make("Concat", *parts, axis=0)
        return self._joined.get(key)

    def constant(self, numbers: int | Sequence[int]) -> ir.Value:
        """Return a constant of the graph."""
        return number_constant(self.graph, numbers)

    def make(self, op: str, *inputs: ir.Value, **attributes: int | list[int]) -> ir.Value:
        """Insert an op at the beginning of the graph; return its result."""
        node = ir.node(op, inputs, attributes)
        self.add(node)
        return node.outputs[0]

    def add(self, *nodes: ir.Node) -> None:
        """Insert ops at the beginning of the graph."""
        self.graph.insert_before(self._first, nodes)

    def _find(self, given: ir.Value) -> ir.Value:
        """Return (1, tokens, 2): row and column of each true value."""
        turned = self.make("Transpose", self.make("NonZero", given), perm=[1, 0])
        return self.make("Unsqueeze", turned, self.constant([0]))

    def _find_items(self, packed: bool, repeats: int) -> ir.Value:
        """Return the indices of tokens, or of all items of each token, in a form with one axis of tokens."""
        key = (packed, repeats)
        if key not in self._repeated and repeats == 1:
            found = self.make("Squeeze", self.make("NonZero", self._row), self.constant([0])) if packed else None
            self._repeated[key] = self._places if found is None else found
        elif key not in self._repeated:
            column = self.make("Reshape", self._find_items(packed, 1), self.constant([-1, 1]))
            first = self.make("Mul", column, self.constant(repeats))
            items = self.make("Add", first, self.constant([*range(repeats)]))
            self._repeated[key] = self.make("Reshape", items, self.constant([-1]))
        return self._repeated[key]
