"""The ops that OpenVINO computes, and the form of programs that it accepts.

OpenVINO publishes no list of its ops, so this module lists those that its ONNX reader cannot translate.
"""

import onnx
import torch

from lorac.backends.onnx.legalize import Legalize
from lorac.backends.onnx.passes import OnnxDialect
from lorac.backends.openvino.cached_attention import ExpandCachedAttention
from lorac.backends.openvino.recurrence_chunks import ComputeByChunks
from lorac.backends.openvino.wrapped_padding import JoinWrappedPadding
from lorac.ir.sites.site import SiteKind
from lorac.ir.slots.plans import RankPolicy
from lorac.target.dialect import BranchGate, Dialect

_UNTRANSLATED = """
BitCast CausalConvWithState CumProd DeformConv Det ImageDecoder LinearAttention MaxUnpool MelWeightMatrix Optional
OptionalGetElement OptionalHasElement RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase
SequenceInsert SequenceLength SequenceMap SplitToSequence ConcatFromSequence StringConcat StringNormalizer StringSplit
SwiGLU TensorScatter TfIdfVectorizer
"""
"""Ops that OpenVINO 2026.4 refuses whatever their operands, found by giving it each. Modes of other ops that it lacks
are refused where the program is read."""
_WRONG = ("If",)
"""Ops with which OpenVINO 2026.4 answers wrongly: behind a second ``If`` the first call of a larger size reads memory
that nothing has written."""
_QUANTISED = frozenset({("com.microsoft", "MatMulNBits"), ("com.microsoft", "GatherBlockQuantized")})
"""Products with codes and lookups of them, whose weights OpenVINO dequantises inside its own products."""

DIALECT: OnnxDialect = Dialect(
    name="openvino",
    claims=_QUANTISED.union(
        ("", schema.name)
        for schema in onnx.defs.get_all_schemas()
        if not schema.domain and schema.name not in (*_UNTRANSLATED.split(), *_WRONG)
    ),
    passes=(Legalize(),),
    early_rewrites=(ExpandCachedAttention(),),
    late_rewrites=(ComputeByChunks(), JoinWrappedPadding()),
    gates=BranchGate.WHERE,  # OpenVINO computes ``If`` wrongly
    # The CPU has no convolution with a kernel of dynamic shape; products accept rank 0.
    ranks=dict.fromkeys((SiteKind.CONV1D, SiteKind.CONV2D, SiteKind.CONV3D), RankPolicy.FIXED),
    dtypes=(torch.float32,),
    rows=True,
    why_branches_shared="its branches have one place in a program",
    functions=False,
)
