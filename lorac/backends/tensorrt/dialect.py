"""The ops that TensorRT computes, and the form of programs that it accepts.

TensorRT's ONNX parser reads the names of ops but not their domains, so ``made.up::Add`` would pass for an addition. So
this module lists the supported ops, and a program is checked against the list before it is parsed.
"""

import torch

from lorac.backends.onnx.legalize import Legalize
from lorac.backends.onnx.passes import OnnxDialect
from lorac.ir.sites.site import SiteKind
from lorac.ir.slots.plans import RankPolicy
from lorac.target.dialect import BranchGate, ClaimedOps, Dialect

_OPS = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization BlackmanWindow
Cast CastLike CausalConvWithState Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather
GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf
IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual LinearAttention Log LogSoftmax Loop LpNormalization
LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot
Or PRelu Pad Pow QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike
Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round STFT Scan Scatter
ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth
Split Sqrt Squeeze Sub Sum Swish Tan Tanh TensorScatter ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze
Upsample Where Xor
"""
CLAIMS: ClaimedOps = frozenset(("", op) for op in _OPS.split())
"""The ops of ONNX's own domain that the parser of TensorRT for RTX 1.7 translates, the longest list of all releases. A
library whose parser translates fewer refuses the others by name (``network``)."""

_FROM_ONE = (SiteKind.LINEAR, SiteKind.EMBEDDING)
_FIXED = (SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.CONV3D)

DIALECT: OnnxDialect = Dialect(
    name="tensorrt",
    claims=CLAIMS,
    passes=(Legalize(),),
    # Conditional layers cannot always be captured into CUDA graphs; a selection can.
    gates=BranchGate.WHERE,
    # The library does not promise to support sizes of 0, and a convolution's channels must be constants.
    ranks=dict.fromkeys(_FROM_ONE, RankPolicy.FROM_ONE) | dict.fromkeys(_FIXED, RankPolicy.FIXED),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    # Whether fused products are faster is not measured, since the library chooses kernels itself.
    fuses_projections=False,
    rows=True,
    why_shared=dict.fromkeys(_FIXED, "a plan convolves all rows with one kernel"),
    why_branches_shared="its branches have one place in a plan",
    functions=False,
)
