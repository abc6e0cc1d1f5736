"""A pass for ops without a half-precision CUDA kernel: they compute in float32 in a half-precision program."""

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx
import onnx_ir as ir

from lorac.backends.onnx.claims import op_key
from lorac.backends.onnx.passes import OnnxPass
from lorac.ir.graph.passes import PassResult

Op = tuple[str, str]
Kernels = Mapping[str, Collection[Op]]
"""dtype -> ops, each with its domain."""

_OPS_BY_DTYPES: Mapping[tuple[str, ...], str] = {
    ("float64", "float32", "float16", "bfloat16"): """
        Abs Add Cast Compress Concat ConstantOfShape Div Dropout Erf Exp Expand Flatten Gather GatherElements
        GatherND Gelu Gemm Identity If IsInf IsNaN LayerNormalization Loop MatMul Max Min Mod Mul Neg Pow
        RandomNormalLike RandomUniformLike ReduceMean ReduceSum Relu Reshape ReverseSequence Scan
        ScatterElements ScatterND SequenceAt SequenceConstruct Shape Sigmoid Sign SimplifiedLayerNormalization
        Size Slice Softmax Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Trilu Unsqueeze Where
        com.microsoft::BiasGelu com.microsoft::FastGelu com.microsoft::FusedMatMul com.microsoft::Gelu
        com.microsoft::QuickGelu
    """,
    ("float64", "float32", "float16"): """
        ArgMax ArgMin AveragePool BatchNormalization Ceil Clip Conv ConvTranspose Cos CumSum DepthToSpace Einsum
        Elu Equal Floor GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual HardSigmoid HardSwish
        InstanceNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MaxPool PRelu Pad RandomNormal
        RandomUniform Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMin ReduceProd
        ReduceSumSquare Resize Round Selu Shrink Sin Softplus Softsign SpaceToDepth ThresholdedRelu TopK
    """,
    ("float32", "float16", "bfloat16"): """
        com.microsoft::Attention com.microsoft::GatherBlockQuantized com.microsoft::GroupQueryAttention
        com.microsoft::MatMulBnb4 com.microsoft::MatMulNBits com.microsoft::MultiHeadAttention
        com.microsoft::RotaryEmbedding com.microsoft::SkipLayerNormalization
        com.microsoft::SkipSimplifiedLayerNormalization
    """,
    ("float32", "float16"): """
        DequantizeLinear LpNormalization NonZero OneHot QuantizeLinear
    """,
}
"""dtypes -> the ops that onnxruntime-gpu 1.31 has a kernel in them for on CUDA, of ONNX's opset 20 and its own domain.

The list is written down, since the library's own (``get_all_opkernel_def``) ends the process where a provider cannot be
loaded, for instance on a machine without TensorRT. A kernel that a newer release adds is not used; one that it drops is
named by its session.
"""
HALF_PRECISION_OPS: Kernels = {
    dtype: frozenset(
        (op.rpartition("::")[0], op.rpartition("::")[2])
        for dtypes, ops in _OPS_BY_DTYPES.items()
        if dtype in dtypes
        for op in ops.split()
    )
    for dtype in ("float16", "bfloat16")
}
"""Half precision -> the ops that CUDA computes in it."""
_HALF = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_DTYPE_AGNOSTIC = frozenset({"Cast", "CastLike", "Constant", "If", "Identity", "Loop", "Scan"})
"""Ops that compute nothing of their own."""


@dataclass(frozen=True)
class WidenHalfPrecision(OnnxPass):
    """Compute ops that lack a half-precision kernel in float32.

    Operands are widened, which is exact, and results are rounded once. torch's own kernels do the same: they keep
    operands of half precision in float32.

    Attributes:
        kernels: half precision -> the ops that have a kernel for it.
    """

    name: ClassVar[str] = "widen-half-precision"
    kernels: Kernels = field(default_factory=lambda: HALF_PRECISION_OPS)

    def apply(self, model: ir.Model) -> PassResult:
        if not any(value.dtype in _HALF for value in (*model.graph.inputs, *model.graph.initializers.values())):
            return PassResult(changed=False)
        casts = _CastInserter()
        nodes = [(graph, node) for graph in (model.graph, *model.graph.subgraphs()) for node in graph]
        for _, node in nodes:
            _infer_dtypes(node)
        for graph, node in nodes:
            read = {value.dtype for value in node.inputs if value is not None}
            lacking = [
                dtype for dtype in read if dtype in _HALF and op_key(node) not in self.kernels.get(_HALF[dtype], ())
            ]
            if lacking and node.op_type not in _DTYPE_AGNOSTIC:
                casts.widen(graph, node, lacking[0])
        return PassResult(casts.inserted)


def _infer_dtypes(node: ir.Node) -> None:
    """Set dtypes of results that rewrites left out, as ONNX infers them from the operands' dtypes."""
    (domain, op), missing = op_key(node), [value for value in node.outputs if value.dtype is None]
    if not missing or not onnx.defs.has(op, domain):
        return
    schema = onnx.defs.get_schema(op, domain=domain)
    constraints = ((one.type_param_str, one.allowed_type_strs) for one in schema.type_constraints)
    fixed = {variable: allowed[0] for variable, allowed in constraints if len(allowed) == 1}
    inputs, outputs = ([value.type_str for value in values] for values in (schema.inputs, schema.outputs))
    read = {inputs[min(i, len(inputs) - 1)]: v.dtype for i, v in enumerate(node.inputs) if v is not None}
    for value in missing:
        variable = outputs[min(value.index() or 0, len(outputs) - 1)]
        kind = fixed.get(variable, variable).removeprefix("tensor(").removesuffix(")").upper()  # INT64
        dtype = read.get(variable) or ir.DataType.__members__.get(kind)
        if dtype is not None:
            value.dtype = dtype


class _CastInserter:
    """An inserter of casts around ops; names of the cast values are unique in a model, including nested graphs."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._wide: dict[tuple[int, ir.Value], ir.Value] = {}
        self.inserted = False

    def widen(self, graph: ir.Graph | ir.Function, node: ir.Node, half: ir.DataType) -> None:
        """Compute a half-precision node in float32."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == half:
                key = (id(graph), value)  # each value is cast once
                if key not in self._wide:
                    cast = self._cast(value, ir.DataType.FLOAT, node)
                    graph.insert_before(node, cast)
                    self._wide[key] = cast.outputs[0]
                node.replace_input_with(index, self._wide[key])
        for old in [value for value in node.outputs if value.dtype == half]:
            rounded = self._cast(old, half, node)
            graph.insert_after(node, rounded)
            new = rounded.outputs[0]
            old.replace_all_uses_with(new, replace_graph_outputs=True)
            rounded.replace_input_with(0, old)
            new.name, old.name = old.name, new.name
            old.type = ir.TensorType(ir.DataType.FLOAT)

    def _cast(self, value: ir.Value, to: ir.DataType, like: ir.Node) -> ir.Node:
        self.inserted = True
        made = ir.val(f"in_float_{next(self._numbers)}", type=ir.TensorType(to), shape=value.shape)
        cast = ir.Node("", "Cast", [value], {"to": ir.AttrInt64("to", to)}, outputs=[made])
        cast.metadata_props.update(like.metadata_props)
        return cast
