"""What ONNX Runtime computes, and how it likes it written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir
import torch
from onnxruntime.capi import _pybind_state as library

from lorac.backends.onnx.legalize import Legalize
from lorac.backends.onnxruntime.devices.providers import ON_GPU
from lorac.backends.onnxruntime.devices.widening import widen_half_precision
from lorac.backends.onnxruntime.flattening import copy_reshape_sizes, flatten_to_rows
from lorac.backends.onnxruntime.fusions import fuse_rms_norms, fuse_rotary_positions, fuse_top_k
from lorac.backends.onnxruntime.group_query_attention import use_group_query_attention
from lorac.target.dialect import BranchGate, ClaimedOps, Dialect

_WITHOUT_KERNEL: ClaimedOps = frozenset({("", "Constant")})
"""What the library resolves while it loads a program, so that no kernel is listed."""


def _kernels() -> ClaimedOps:
    """The ops that this build has a kernel for, whichever provider it belongs to.

    Where it has providers for GPUs, listing kernels loads their libraries, and ends the process where one of them is
    missing: then every op that it knows counts, and an op without a kernel is refused by the session.
    """
    if set(library.get_available_providers()) & set(ON_GPU):
        return frozenset((schema.domain, schema.name) for schema in library.get_all_operator_schema())
    return frozenset((kernel.domain, kernel.op_name) for kernel in library.get_all_opkernel_def())


_FUSIONS = (fuse_rms_norms, fuse_rotary_positions, use_group_query_attention)
_ON_CPU: Dialect[ir.Model] = Dialect(
    name="onnxruntime",
    claims=_kernels() | _WITHOUT_KERNEL,
    passes=(Legalize(),),
    fusions=(*_FUSIONS, fuse_top_k),
    finish=(flatten_to_rows, copy_reshape_sizes),
    gates=BranchGate.IF,
)
_ON_CUDA = dataclasses.replace(
    _ON_CPU,
    fusions=_FUSIONS,  # there TopK promises nothing about equals
    finish=(*_ON_CPU.finish, widen_half_precision),
    dtypes=(*_ON_CPU.dtypes, torch.float16, torch.bfloat16),
)
DIALECTS: Mapping[str, Dialect[ir.Model]] = {"cpu": _ON_CPU, "cuda": _ON_CUDA}
"""Kind of device -> what sessions can run there; what a GPU has no kernel for, a session has the CPU compute."""
