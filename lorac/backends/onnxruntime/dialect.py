"""What ONNX Runtime computes, and how it likes it written."""

from __future__ import annotations

import onnx_ir as ir
from onnxruntime.capi import _pybind_state as library

from lorac.backends.onnx.legalize import Legalize
from lorac.backends.onnxruntime.caching import use_group_query_attention
from lorac.backends.onnxruntime.flattening import to_rows
from lorac.backends.onnxruntime.fusions import fuse_rms_norms, fuse_rotary_positions
from lorac.ir.engine import Claims, Dialect, Gate

_RESOLVED: Claims = frozenset({("", "Constant")})
"""What the library resolves while it loads a program, so that no kernel is listed."""


def _kernels() -> Claims:
    """The ops that this build has a kernel for, whichever provider it belongs to."""
    return frozenset((kernel.domain, kernel.op_name) for kernel in library.get_all_opkernel_def())


DIALECT: Dialect[ir.Model] = Dialect(
    name="onnxruntime",
    claims=_kernels() | _RESOLVED,
    passes=(Legalize(),),
    fusions=(fuse_rms_norms, fuse_rotary_positions, use_group_query_attention),
    finish=(to_rows,),
    gates=Gate.IF,
)
