"""A pass that computes the tokens of all rows concatenated, without the padding of shorter rows.

Rows of a call have different numbers of tokens, and a batch pads all rows to the longest. Most of a graph computes each
token separately. There the pass computes one row with the tokens of all rows, the *packed* form. Attention reads the
padded form, and so do ops that are not known to be token-wise, and products with placed slots, whose segments are parts
of the batch. Between the two forms tokens are gathered, by indices that are computed once per call. TensorRT-LLM calls
this removal of input padding; ByteTransformer (https://arxiv.org/abs/2210.03052) measured it.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass

from lorac.backends.onnx.model_files import PACKED_KEY
from lorac.backends.onnx.passes import OnnxPass, copy_node, module_around, nested_nodes
from lorac.backends.onnxruntime.token_axes import Dim, TokenAxes, TokenLayouts, dims_of
from lorac.backends.onnxruntime.token_indices import TokenIndices
from lorac.ir.graph.attention_ops import NEW_LENGTHS, find_token_input
from lorac.ir.graph.graph import Skip
from lorac.ir.graph.passes import PassResult

_TOKENS = "tokens"
"""The name of the number of tokens that all rows bring."""
_PRODUCTS = frozenset({"MatMul", "Gemm", "Gather", "GatherND"})
"""Ops for whose sake tokens are packed; others are computed in the form in which their results are read."""


@dataclass(frozen=True)
class PackTokens(OnnxPass):
    """Compute only actual tokens without padding, in graphs with a cache."""

    name: ClassVar[str] = "pack-tokens"

    def apply(self, model: ir.Model) -> PassResult:
        """Edit the model in place; report products that also compute padding."""
        inputs = {str(value.name): value for value in model.graph.inputs}
        if NEW_LENGTHS not in inputs or PACKED_KEY in model.metadata_props:
            return PassResult(changed=False)
        ids = inputs[find_token_input(inputs)]
        if len({dim for dim in dims_of(ids) if isinstance(dim, str)}) < 2:
            why = "the model fixes the number of rows or of tokens, so all rows have as many"
            return PassResult(changed=False, skipped=(Skip(str(model.graph.name), why),))
        ShapeInferencePass()(model)
        skipped = tuple(dict.fromkeys(_Packer(model.graph, ids, inputs[NEW_LENGTHS]).run()))
        RemoveUnusedNodesPass()(model)
        model.metadata_props[PACKED_KEY] = _TOKENS
        return PassResult(changed=True, skipped=skipped)


class _Packer:
    """One run of the pass over a graph.

    Args:
        graph: the graph, edited in place.
        ids: the tokens.
        new: the number of tokens in each row.

    Attributes:
        packed: value -> its packed form.
        computed: the values that are only computed in packed form.
        dependent: the values that depend on the tokens' contents, not only on their number.
    """

    def __init__(self, graph: ir.Graph, ids: ir.Value, new: ir.Value) -> None:
        self.graph, self.nodes = graph, list(graph)
        slots = {dims_of(value)[0]: value for value in graph.inputs if dims_of(value) and value not in (ids, new)}
        cuts = [node.outputs[0] for node in graph if _is_cut(node, dims_of(ids), slots)]
        slot = slots[dims_of(cuts[0])[0]] if cuts else None
        self.layouts = TokenLayouts(ids, [cut for cut in cuts if slots[dims_of(cut)[0]] is slot])
        self.index = TokenIndices(graph, ids, new, slot)
        self.packed: dict[ir.Value, ir.Value] = {}
        self.computed: set[ir.Value] = set()
        self.dependent = {ids}
        self._padded: dict[tuple[ir.Value, ir.Graph], ir.Value] = {}
        self._pack(ids)

    def run(self) -> Iterator[Skip]:
        """Pack token-wise ops; yield the products that also compute padding."""
        token_wise = {node for node in self.nodes if self.layouts.is_token_wise(node)}
        packs = token_wise - self._find_preparations(token_wise)
        for node in self.nodes:
            read = itertools.chain(node.inputs, *(inner.inputs for inner in nested_nodes(node)))
            if node.op_type != "Shape" and not self.dependent.isdisjoint(read):
                self.dependent.update(node.outputs)
            known = node.inputs and node.inputs[0] in self.computed and self._renames(node)
            if self._choose_tokens(node) or ((known or node in packs) and self._pack_node(node)):
                continue
            # The op, and those of its nested graphs, read the padded form of values.
            reads = [(one, place, v) for one in (node, *nested_nodes(node)) for place, v in enumerate(one.inputs)]
            for reader, place, value in reads:
                if value is not None and value in self.computed and not self._read_sizes(reader, value):
                    assert reader.graph is not None
                    reader.replace_input_with(place, self._pad(value, reader.graph))
            if node.op_type not in ("MatMul", "Gemm") or node.outputs[0] not in self.dependent:
                continue
            constant = node.inputs[1] is not None and ir.convenience.get_const_tensor(node.inputs[1]) is not None
            dims = dims_of(node.inputs[0])
            if constant and (not dims or any(str(self.layouts.length) in str(dim).split("*") for dim in dims)):
                yield Skip(
                    module_around(node), "its operand is not known to be token by token, so padding is multiplied too"
                )
        for place, value in enumerate(self.graph.outputs):
            if value in self.computed:
                self.graph.outputs[place] = self._pad(value, self.graph)
                value.name, self.graph.outputs[place].name = None, value.name

    def _find_preparations(self, token_wise: set[ir.Node]) -> set[ir.Node]:
        """Return the ops, except products, whose results only padded ops read; they are computed padded as well."""
        found: set[ir.Node] = set()
        for node in reversed(self.nodes):
            readers = [user for value in node.outputs for user, _ in value.uses() if user.op_type != "Shape"]
            padded = all((user not in token_wise or user in found) and not _chooses(user) for user in readers)
            written = any(value.is_graph_output() for value in node.outputs)
            if padded and not written and node.op_type not in _PRODUCTS:
                found.add(node)
        return found

    # ── Packed ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def _pack_node(self, node: ir.Node) -> bool:
        """Compute a token-wise op in packed form; return False if several inputs would have to be packed for it."""
        tokens = dict.fromkeys(v for v in node.inputs if v is not None and self.layouts.of(v) is not None)
        read = self.dependent.intersection(tokens)
        if not read or (len(read) > 1 and read.isdisjoint(self.packed)):
            return False
        packed = {value: self._pack(value) for value in tokens}
        if self._renames(node):
            self._note(node.outputs[0], packed[next(iter(tokens))])
            return True
        inputs = [None if value is None else packed.get(value, value) for value in node.inputs]
        attributes = dict(node.attributes)
        if node.op_type in ("Reshape", "Expand"):
            sizes = self._sizes(node.outputs[0], -1 if node.op_type == "Reshape" else 1)
            inputs[1] = self.index.constant([size for size in sizes if isinstance(size, int)])
            attributes.pop("allowzero", None)
        twin = copy_node(node, inputs, attributes.values())
        self.graph.insert_before(node, twin)
        for value, made in zip(node.outputs, twin.outputs, strict=True):
            if self.layouts.of(value) is not None:  # other outputs are not read
                made.name, made.type, made.shape = f"{value.name}_packed", value.type, self._shape(value)
                self._note(value, made)
        return True

    def _renames(self, node: ir.Node) -> bool:
        """Return whether a value and its segments have the same packed form."""
        value = node.inputs[0] if node.op_type == "Reshape" and self.layouts.is_token_wise(node) else None
        return value is not None and self._shape(value) == self._shape(node.outputs[0])

    def _note(self, value: ir.Value, packed: ir.Value) -> None:
        self.packed[value] = packed
        self.computed.add(value)

    def _pack(self, value: ir.Value) -> ir.Value:
        """Return the packed form of a value."""
        if value not in self.packed:
            self.packed[value] = packed = self._gather(value, value, self.index.of_packed, self.graph)
            packed.name, packed.shape = f"{value.name}_packed", self._shape(value)
        return self.packed[value]

    def _shape(self, value: ir.Value) -> ir.Shape:
        """Return the shape of a value's packed form."""
        return ir.Shape(self._sizes(value, _TOKENS))

    def _sizes(self, value: ir.Value, tokens: int | str) -> list[int | str | None]:
        found, sizes = self.layouts.of(value), dims_of(value)
        assert found is not None
        for axis in found.axes:
            sizes[axis] = 1
        sizes[found.axes[-1]] = tokens if found.repeats == 1 or tokens != _TOKENS else f"{found.repeats}*{tokens}"
        return sizes

    # ── Padded ───────────────────────────────────────────────────────────────────────────────────────────────────────
    def _read_sizes(self, node: ir.Node, value: ir.Value) -> bool:
        """Make readers of a value's ``Shape`` read the sizes of the ids; return whether the op is such a ``Shape``."""
        start, end = (node.attributes.get_int(name, None) for name in ("start", "end"))
        sizes = self.index.sizes(dims_of(value)[start:end]) if node.op_type == "Shape" else None
        if sizes is not None:
            node.outputs[0].replace_all_uses_with(sizes)
        return sizes is not None

    def _pad(self, value: ir.Value, reader: ir.Graph) -> ir.Value:
        """Return the padded form of a packed value, in the graph that reads it."""
        key = (value, reader)
        if key not in self._padded:
            self._padded[key] = padded = self._gather(self.packed[value], value, self.index.of_padded, reader)
            padded.name, padded.shape = f"{value.name}_padded_{len(self._padded)}", value.shape
        return self._padded[key]

    def _gather(
        self, source: ir.Value, value: ir.Value, indices: Callable[[TokenAxes], ir.Value], reader: ir.Graph
    ) -> ir.Value:
        """Gather the tokens of one form of a value by indices, after that form or in a nested graph."""
        found, rank = self.layouts.of(value), len(dims_of(value))
        assert found is not None
        order = [*found.places(rank), *(axis for axis in range(rank) if axis not in found.places(rank))]
        turns = [] if found.leads(rank) else [order, [order.index(axis) for axis in range(rank)]]
        nodes, taken = [], source
        if turns:
            nodes.append(ir.Node("", "Transpose", [taken], [ir.AttrInt64s("perm", turns[0])]))
            taken = nodes[-1].outputs[0]
        nodes.append(ir.Node("", "Gather" if len(found.axes) == 1 else "GatherND", [taken, indices(found)]))
        if turns:
            nodes.append(ir.Node("", "Transpose", [nodes[-1].outputs[0]], [ir.AttrInt64s("perm", turns[1])]))
        made = source.producer()
        for place, node in enumerate(nodes):
            node.metadata_props.update({} if made is None else made.metadata_props)
            node.outputs[0].name, node.outputs[0].type = f"{source.name}_{len(self._padded)}_{place}", value.type
        if reader is not self.graph:
            reader.insert_before(reader[0], nodes)
        elif made is None:
            self.index.add(*nodes)
        else:
            self.graph.insert_after(made, nodes)
        return nodes[-1].outputs[0]

    def _choose_tokens(self, node: ir.Node) -> bool:
        """Redirect an op that gathers tokens of each row to the packed form; return whether it is such an op."""
        value = node.inputs[0] if _chooses(node) else None
        if value is None or value not in self.computed or self.layouts.of(value) != _pair(value):
            return False
        batch = [ir.AttrInt64("batch_dims", 1)]
        places = ir.Node("", "GatherND", [self.index.of_padded(_pair(value)), node.inputs[1]], batch)
        self.graph.insert_before(node, places)
        node.replace_input_with(0, self.packed[value])
        node.replace_input_with(1, places.outputs[0])
        node.attributes.pop("batch_dims")
        return True


def _pair(value: ir.Value) -> TokenAxes:
    """Return the axes of tokens in a value (batch, length, …)."""
    rank = len(dims_of(value))
    return TokenAxes((-rank, 1 - rank))


def _chooses(node: ir.Node) -> bool:
    """Return whether an op gathers some tokens of each row."""
    return (
        node.op_type == "GatherND"
        and node.attributes.get_int("batch_dims", 0) == 1
        and dims_of(node.inputs[1])[-1:] == [1]
    )


def _is_cut(node: ir.Node, tokens: Sequence[Dim], slots: Mapping[Dim, ir.Value]) -> bool:
    """Return whether an op cuts tokens (batch, length, …) into segments, one per place of a slot."""
    read, made = dims_of(node.inputs[0] if node.inputs else None), dims_of(node.outputs[0])
    return (
        node.op_type == "Reshape"
        and read[:2] == tokens
        and made[:1] != tokens[:1]
        and made[0] in slots
        and isinstance(made[1], str)
    )
