"""The ops that ONNX Runtime computes on CUDA in half precision.

The list is what onnxruntime-gpu 1.31 registers for ONNX's opset 20 and its own domain. It is written down here, since
the library's own list (``get_all_opkernel_def``) ends the process where a provider cannot be loaded, for instance on a
machine without TensorRT. A kernel that a newer release adds is not used; one that it drops is named by its session.
"""

from collections.abc import Collection, Mapping

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
"""dtypes -> the ops that have a kernel in them, those of a domain behind its name."""


def _parse_op(op: str) -> Op:
    domain, _, name = op.rpartition("::")
    return domain, name


def _ops_in(dtype: str) -> Collection[Op]:
    return frozenset(_parse_op(op) for dtypes, ops in _OPS_BY_DTYPES.items() if dtype in dtypes for op in ops.split())


HALF_PRECISION_OPS: Kernels = {dtype: _ops_in(dtype) for dtype in ("float16", "bfloat16")}
"""Half precision -> the ops that CUDA computes in it."""
