"""Which ops ONNX Runtime computes on CUDA in half precision, and how a program computes the others there.

The list is what onnxruntime-gpu 1.31 registers for ONNX's opset 20 and its own domain. It is written down, since the
library's own (``get_all_opkernel_def``) ends the process where it cannot load one of its providers: on a machine
without TensorRT, say. A kernel that a newer release adds is not made use of; one that it drops, its session names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

Op = tuple[str, str]
_HALF = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_AS_THEY_ARE = frozenset({"Cast", "CastLike", "Constant", "If", "Identity", "Loop", "Scan"})
"""Ops that compute nothing of their own."""


def compute_in_float(model: ir.Model) -> None:
    """Have ops that CUDA has no half-precision kernel for compute in float32, in place.

    Their operands are widened, which is exact, and their results rounded once: as torch's own kernels compute, which
    hold in float32 what they read in half precision.
    """
    graphs = [model.graph, *model.graph.subgraphs()]
    widened: dict[tuple[int, ir.Value], ir.Value] = {}
    for graph in graphs:
        for node in list(graph):
            if (half := _lacking(node)) is not None:
                _widen(graph, node, half, widened)


def _lacking(node: ir.Node) -> ir.DataType | None:
    """The half precision that a node reads, where CUDA does not compute its op in that."""
    if node.op_type in _AS_THEY_ARE:
        return None
    read = {value.dtype for value in node.inputs if value is not None and value.dtype in _HALF}
    op = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
    return next((dtype for dtype in read if op not in IN_HALF[_HALF[dtype]]), None)


def _widen(
    graph: ir.Graph | ir.Function, node: ir.Node, half: ir.DataType, widened: dict[tuple[int, ir.Value], ir.Value]
) -> None:
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype != half:
            continue
        key = (id(graph), value)
        if key not in widened:
            cast = _cast(value, ir.DataType.FLOAT, node)
            graph.insert_before(node, cast)
            widened[key] = cast.outputs[0]
        node.replace_input_with(index, widened[key])
    for old in node.outputs:
        if old.dtype is not None and old.dtype != half:
            continue
        _round(graph, node, old, half)


def _round(graph: ir.Graph | ir.Function, node: ir.Node, old: ir.Value, half: ir.DataType) -> None:
    """Give those who read a result in half precision what is rounded to it."""
    rounded = _cast(old, half, node)
    graph.insert_after(node, rounded)
    new, name = rounded.outputs[0], old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    rounded.replace_input_with(0, old)
    new.name, old.name = name, f"{name}_in_float"
    old.type = ir.TensorType(ir.DataType.FLOAT)


def _cast(value: ir.Value, to: ir.DataType, like: ir.Node) -> ir.Node:
    made = ir.val(None, type=ir.TensorType(to), shape=value.shape)
    cast = ir.Node("", "Cast", [value], {"to": ir.AttrInt64("to", to)}, outputs=[made])
    cast.metadata_props.update(like.metadata_props)
    return cast


_LISTED: Mapping[tuple[str, ...], str] = {
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
"""dtypes -> the ops that have a kernel in them, those of a domain behind its name."""


def _parsed(op: str) -> Op:
    domain, _, name = op.rpartition("::")
    return domain, name


def _in(dtype: str) -> Collection[Op]:
    return frozenset(_parsed(op) for dtypes, ops in _LISTED.items() if dtype in dtypes for op in ops.split())


IN_HALF: Mapping[str, Collection[Op]] = {dtype: _in(dtype) for dtype in _HALF.values()}
"""Half precision -> the ops that CUDA computes in it."""
