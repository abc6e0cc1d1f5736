"""A pass that quantises the constant matrices of an emitted program, and the products and lookups that read them.

A constant matrix is quantised if every reader is a product with it from the right (``MatMul``, ``Gemm``) or a lookup of
rows (``Gather``), and all readers use the same axis. So a table that is tied to an output layer is stored once, and
both ops read the same bytes. Slots are not constants, and stay float.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from lorac.backends.onnx.claims import modules_of
from lorac.backends.onnx.passes import OnnxPass, number_constant, shared_constant
from lorac.backends.onnx.quantised.algorithms import RTN, encode
from lorac.backends.onnx.quantised.calibration import Calibration
from lorac.backends.onnx.quantised.codec import ACCURACY_ATTRIBUTE, Array, Codec, EncodedMatrix, stack_rows
from lorac.backends.onnx.quantised.quantisation_report import QuantisationReport, QuantisedProduct
from lorac.frontend.quantised_weights import NF4
from lorac.ir.graph.passes import PassResult

_DOMAIN = "com.microsoft"
_QUANT_TYPES = {NF4: 1}
"""Table of levels -> its number in ``MatMulBnb4``."""
_MIXED_SHARE = 1 / 10
"""How many more bytes weights of mixed widths may take, as a share of those of 4-bit weights."""
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True, eq=False)
class PrequantisedMatrix:
    """A pre-quantised matrix (out, in).

    Attributes:
        matrix: the dequantised matrix.
        encoded: its codes, in the form that programs store.
    """

    matrix: Array
    encoded: EncodedMatrix

    def is_at(self, begin: int, matrix: Array) -> bool:
        """Return whether this matrix equals the rows of a larger matrix from ``begin``."""
        rows = matrix[begin : begin + len(self.matrix)]
        return (
            rows.shape == self.matrix.shape
            and bool((rows[0] == self.matrix[0]).all())
            and (np.array_equal(rows, self.matrix))
        )


@dataclass(frozen=True)
class QuantiseWeights(OnnxPass):
    """Quantise the constant matrices of a program after its slots are filled or baked.

    Attributes:
        codec: the codec; None if only pre-quantised matrices are stored quantised.
        accuracy_level: the precision of products (``QuantisationOptions.product_level``).
        prequantised: pre-quantised matrices, whose codes are used unchanged, even if several were fused.
        head: the codec of output layers and of tables tied to them; None: ``codec``.
        algorithm: one of ``lorac.backends.onnx.quantised.algorithms.ALGORITHMS``.
        calibration: second moments of layers' inputs, if the algorithm needs them.
        mixed: whether the first and last matrices get 8 bits, for up to ``_MIXED_SHARE`` more bytes in total.
        parameters: the names of the model's parameters. Tables of other values that are only looked up, such as biases
            or rotary factors by position, stay float: values of one row may differ by orders of magnitude. None: any
            table is quantised.
        given: matrices whose codes are used unchanged: those in ``prequantised``, and tables of graphs that were
            quantised before, since an encoder may read the table that is tied to the decoder's output layer.
    """

    name: ClassVar[str] = "quantise-weights"
    codec: Codec | None
    accuracy_level: int
    prequantised: Sequence[PrequantisedMatrix] = ()
    head: Codec | None = None
    algorithm: str = RTN
    calibration: Calibration | None = None
    mixed: bool = False
    parameters: Collection[str] | None = None
    given: list[PrequantisedMatrix] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.given.extend(self.prequantised)

    def apply(self, model: ir.Model) -> PassResult:
        """Quantise in place; the details of the result are a ``QuantisationReport``."""
        quantised: dict[str, QuantisedProduct] = {}
        floats: dict[str, str] = {}
        found = [
            (value, constant, _find_readers(value))
            for value in model.graph.initializers.values()
            if (constant := value.const_value) is not None and not value.is_graph_input()
            if len(constant.shape) > 1 and constant.dtype in _FLOATS
        ]
        tables = {_shape_read(constant, readers) for _, constant, readers in found if _has_lookup(readers)}
        has_head = False
        coded: list[_CodedConstant] = []
        for value, constant, readers in found:
            looked_up = not isinstance(readers, str) and all(reader.looks_up for reader in readers)
            is_head = not isinstance(readers, str) and not looked_up and _shape_read(constant, readers) in tables
            if looked_up and self.parameters is not None and str(value.name).replace(":", ".") not in self.parameters:
                encoded: EncodedMatrix | str = "tables that are no parameters"
            else:
                encoded = readers if isinstance(readers, str) else self._encode(constant, readers, is_head=is_head)
            if isinstance(readers, str) or isinstance(encoded, str):
                modules = next((modules_of(node.metadata_props) for node, _ in value.uses()), None)
                folded = modules and "." not in str(value.name)  # during emission: its reader's name says more
                floats[modules[-1] if modules and folded else str(value.name)] = str(encoded)
                continue
            has_head |= is_head
            coded.append(_CodedConstant(value, constant, readers, encoded))
        for one in self._widen(model, coded) if self.mixed else coded:
            names = _replace(model, one.value, one.readers, one.encoded, self.accuracy_level)
            product = QuantisedProduct(one.encoded, one.readers[0].by_columns, one.constant, names)
            quantised[str(one.value.name)] = product
            if _shape_read(one.constant, one.readers) in tables:
                self.given.append(PrequantisedMatrix(one.matrix(), one.encoded))
        RemoveUnusedNodesPass()(model)
        model.graph.opset_imports.setdefault(_DOMAIN, 1)
        missed = () if self.calibration is None else tuple(self.calibration.missed)
        return QuantisationReport(quantised, floats, self.accuracy_level, missed, has_head=has_head).to_result()

    def _widen(self, model: ir.Model, coded: "Sequence[_CodedConstant]") -> "list[_CodedConstant]":
        """Store the matrices that are read first and last in 8 bits, alternately from both ends; keep given codes."""
        assert self.codec is not None
        wide, room = replace(self.codec, bits=8), _MIXED_SHARE * sum(one.encoded.nbytes for one in coded)
        order = {node: place for place, node in enumerate(model.graph.all_nodes())}
        found = sorted(coded, key=lambda one: min(order[reader.node] for reader in one.readers))
        for place in sorted(range(len(found)), key=lambda place: min(place, len(found) - 1 - place)):
            one, matrix = found[place], found[place].matrix()
            more = wide.count_bytes(one.encoded.shape) - one.encoded.nbytes
            given = one.encoded.codec != self.codec or _reuse_codes(matrix, self.given) is not None
            if not given and more <= room:
                found[place], room = replace(one, encoded=wide.encode(matrix)), room - more
        return found

    def _encode(
        self, constant: ir.TensorProtocol, readers: "Sequence[_MatrixReader]", *, is_head: bool
    ) -> EncodedMatrix | str:
        """Return the codes of a constant, or the reason why it stays float."""
        if constant.dtype is not ir.DataType.FLOAT:
            return f"of {str(constant.dtype).lower()} numbers"
        if len(constant.shape) > 2:
            return f"of {len(constant.shape)} axes"
        if len({reader.by_columns for reader in readers}) > 1:
            return "read along both axes"
        matrix = _read_matrix(constant, readers)
        looked_up = _has_lookup(readers)  # lookups do not support tables of levels
        known = [one for one in self.given if not (one.encoded.codec.table and looked_up)]
        if (reused := _reuse_codes(matrix, known)) is not None:
            return reused
        codec = (self.head if is_head else None) or self.codec
        if codec is None:
            return "float in the model"
        why_not = codec.why_not(matrix.shape[1])
        if why_not or codec != self.codec:  # a head with another codec is rounded to the nearest
            return why_not or codec.encode(matrix)
        product, moments = next((reader.node for reader in readers if not reader.looks_up), None), None
        if self.calibration is not None and product is not None:
            moments = self.calibration.find(modules_of(product.metadata_props) or (), torch.from_numpy(matrix))
        return encode(codec, matrix, self.algorithm, moments)


@dataclass(frozen=True)
class _MatrixReader:
    """A node that reads a constant matrix.

    Attributes:
        by_columns: whether the rows that it reads are columns of the constant.
    """

    node: ir.Node
    by_columns: bool

    @property
    def looks_up(self) -> bool:
        return self.node.op_type == "Gather"


@dataclass(frozen=True, eq=False)
class _CodedConstant:
    """A constant matrix and its codes.

    Attributes:
        readers: the nodes that read it.
    """

    value: ir.Value
    constant: ir.TensorProtocol
    readers: list[_MatrixReader]
    encoded: EncodedMatrix

    def matrix(self) -> Array:
        """Return the matrix that was encoded."""
        return _read_matrix(self.constant, self.readers)


def _has_lookup(readers: Sequence[_MatrixReader] | str) -> bool:
    return not isinstance(readers, str) and any(reader.looks_up for reader in readers)


def _read_matrix(constant: ir.TensorProtocol, readers: Sequence[_MatrixReader]) -> Array:
    """Return a constant as a matrix whose rows its readers read."""
    matrix: Array = constant.numpy()
    return matrix.T if readers[0].by_columns else matrix


def _shape_read(constant: ir.TensorProtocol, readers: Sequence[_MatrixReader] | str) -> tuple[int, ...]:
    """Return the shape of that matrix."""
    shape = tuple(constant.shape.numpy())
    return shape[::-1] if not isinstance(readers, str) and readers[0].by_columns else shape


def _find_readers(value: ir.Value, transposed: bool = False) -> list[_MatrixReader] | str:
    """Return the products and lookups that read a constant, possibly transposed, or the reason why it stays float."""
    found: list[_MatrixReader] = []
    if value.is_graph_output():
        return "an output of the program"
    for node, index in value.uses():
        own = node.domain == ""
        if node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [1, 0])) == [1, 0]:
            readers = _find_readers(node.outputs[0], not transposed)
            if isinstance(readers, str):
                return readers
            found += readers
        elif own and index == 1 and _multiplies_rows(node):
            by_rows = node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1
            found.append(_MatrixReader(node, by_rows == transposed))
        elif own and node.op_type == "Gather" and index == 0 and node.attributes.get_int("axis", 0) == 0:
            found.append(_MatrixReader(node, transposed))
        else:
            return f"read by {node.op_type}"
    return found or "read by nothing"


def _multiplies_rows(node: ir.Node) -> bool:
    """Return whether a node is a plain product of rows and its second input."""
    if node.op_type == "Gemm":
        plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        return plain and not node.attributes.get_int("transA", 0)
    x = node.inputs[0]
    return node.op_type == "MatMul" and x is not None and (x.shape is None or len(x.shape) > 1)


def _reuse_codes(matrix: Array, given: Sequence[PrequantisedMatrix]) -> EncodedMatrix | None:
    """Return the codes of a pre-quantised matrix, or of several fused ones; None if any part was not pre-quantised."""
    parts: list[EncodedMatrix] = []
    begin = 0
    while begin < len(matrix):
        found = next((one.encoded for one in given if one.is_at(begin, matrix)), None)
        if found is None or (parts and found.codec != parts[0].codec):
            return None
        parts.append(found)
        begin += found.shape[0]
    return stack_rows(parts) if parts else None


def _replace(
    model: ir.Model, value: ir.Value, readers: list[_MatrixReader], encoded: EncodedMatrix, level: int
) -> dict[str, str]:
    """Replace the readers of a matrix by quantised ops; return the names of the constants with its arrays."""
    name, codec, graph = str(value.name), encoded.codec, model.graph
    names = {"packed": f"{name}_Q{codec.bits}", "scales": f"{name}_scales", "zeros": f"{name}_zero_points"}
    packed, tables = encoded.packed, [reader for reader in readers if reader.looks_up]
    flat = packed.reshape(len(packed), -1)
    alone = len(tables) == len(readers)
    layout = packed.reshape(-1) if codec.table else flat if alone else packed
    stored = shared_constant(graph, names["packed"], layout)
    scales = shared_constant(graph, names["scales"], encoded.scales.reshape(-1) if codec.table else encoded.scales)
    zeros = None if encoded.zeros is None else shared_constant(graph, names["zeros"], encoded.zeros)
    looked_up = stored
    if tables and not alone:  # lookups read a product's bytes in another shape; they are stored once
        shape = number_constant(graph, [len(packed), -1])
        reshape = ir.Node("", "Reshape", [stored, shape], name=f"{stored.name}_rows")
        reshape.outputs[0].name = f"{stored.name}_rows"
        graph.insert_before(graph[0], reshape)
        looked_up = reshape.outputs[0]
    for reader in readers:
        node = reader.node
        if reader.looks_up:
            made = list(_make_lookup(model, node, encoded, [looked_up, scales, zeros]))
        else:
            made = list(_make_product(node, encoded, [stored, scales, zeros], level))
        for one in made:
            one.metadata_props.update(node.metadata_props)
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, node.outputs, made[-1].outputs)
    return {part: names[part] for part in encoded.parts()}


def _make_product(
    node: ir.Node, encoded: EncodedMatrix, parts: list[ir.Value | None], accuracy_level: int
) -> Iterator[ir.Node]:
    """Make a ``MatMulNBits``, or with a table a ``MatMulBnb4``; add a ``Gemm``'s sum if the op accepts no bias."""
    rows, columns = encoded.shape
    codec = encoded.codec
    settings = {"K": columns, "N": rows, "block_size": codec.block}
    settings |= {"quant_type": _QUANT_TYPES[codec.table]} if codec.table else {"bits": codec.bits}
    settings |= {} if codec.table else {ACCURACY_ATTRIBUTE: accuracy_level}
    added = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    is_bias = added is not None and added.shape is not None and added.shape.dims == (rows,) and not codec.table
    inputs = [node.inputs[0], *parts, *([None, added] if is_bias else [])]
    kind = "MatMulBnb4" if codec.table else "MatMulNBits"
    product = ir.node(kind, _without_last_empty(inputs), settings, domain=_DOMAIN, name=node.name)
    yield product
    if added is not None and not is_bias:
        product.outputs[0].type, product.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        yield ir.Node("", "Add", [product.outputs[0], added])


def _make_lookup(
    model: ir.Model, node: ir.Node, encoded: EncodedMatrix, parts: list[ir.Value | None]
) -> Iterator[ir.Node]:
    """Make a ``GatherBlockQuantized``, and remove the padding of a row's last block."""
    table, *others = parts
    codec = encoded.codec
    settings = {"bits": codec.bits, "block_size": codec.block, "gather_axis": 0, "quantize_axis": 1}
    inputs = _without_last_empty([table, node.inputs[1], *others])
    found = ir.node("GatherBlockQuantized", inputs, settings, domain=_DOMAIN, name=node.name)
    yield found
    if encoded.columns % codec.block:
        bounds = [number_constant(model.graph, [n]) for n in (0, encoded.columns, -1)]
        yield ir.Node("", "Slice", [found.outputs[0], *bounds])


def _without_last_empty(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    while inputs[-1] is None:
        inputs = inputs[:-1]
    return inputs
