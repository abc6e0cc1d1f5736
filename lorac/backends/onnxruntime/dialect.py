"""The ops that ONNX Runtime computes, and passes that rewrite programs into the form that it runs fastest."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
import torch
from onnxruntime.capi import _pybind_state as library

from lorac.backends.onnx.claims import describe_origin
from lorac.backends.onnx.legalize import Legalize
from lorac.backends.onnx.passes import OnnxDialect, OnnxPass
from lorac.backends.onnxruntime.devices.providers import ON_GPU
from lorac.backends.onnxruntime.devices.widening import WidenHalfPrecision
from lorac.backends.onnxruntime.flattening import CopyReshapeSizes, FlattenToRows
from lorac.backends.onnxruntime.fusions import FuseOps
from lorac.backends.onnxruntime.group_query_attention import UseGroupQueryAttention
from lorac.backends.onnxruntime.packing import PackTokens
from lorac.errors import Unavailable
from lorac.ir.graph.passes import PassResult
from lorac.target.dialect import BranchGate, ClaimedOps, Dialect

_RECURRENT = frozenset({"LSTM", "GRU"})


@dataclass(frozen=True)
class CheckRecurrentKernels(OnnxPass):
    """Refuse recurrent layers in float64: the library lists kernels for them, but the kernels raise when they run."""

    name: ClassVar[str] = "check-recurrent-kernels"

    def apply(self, model: ir.Model) -> PassResult:
        """Check the layers; the program is not modified.

        Raises:
            Unavailable: naming the layer.
        """
        for node in model.graph.all_nodes():
            if node.op_type in _RECURRENT and ir.DataType.DOUBLE in {v.dtype for v in node.inputs if v is not None}:
                raise Unavailable(
                    f"onnxruntime has no kernel for {node.op_type} in float64{describe_origin(node.metadata_props)}",
                    next_step="compile with dtype='float32', or with target='eager' in the model's own dtype",
                )
        return PassResult(changed=False)


_WITHOUT_KERNEL: ClaimedOps = frozenset({("", "Constant")})
"""Ops that the library resolves while it loads a program, so that it lists no kernel for them."""


def _kernels() -> ClaimedOps:
    """Return the ops for which this build has a kernel, of any provider.

    In a build with GPU providers, listing kernels loads the providers' libraries, and terminates the process if one is
    missing. So for such a build every op that it knows is listed; the session refuses an op without a kernel.
    """
    if set(library.get_available_providers()) & set(ON_GPU):
        return frozenset((schema.domain, schema.name) for schema in library.get_all_operator_schema())
    return frozenset((kernel.domain, kernel.op_name) for kernel in library.get_all_opkernel_def())


_ON_CPU: OnnxDialect = Dialect(
    name="onnxruntime",
    claims=_kernels() | _WITHOUT_KERNEL,
    passes=(Legalize(),),
    early_rewrites=(FuseOps(top_k=True), UseGroupQueryAttention()),
    late_rewrites=(CheckRecurrentKernels(), PackTokens(), FlattenToRows(), CopyReshapeSizes()),
    gates=BranchGate.IF,
    rows=True,
    why_branches_shared="its branches have one place without branch_rows=True",
)
_ON_CUDA = dataclasses.replace(
    _ON_CPU,
    early_rewrites=(FuseOps(top_k=False), UseGroupQueryAttention()),
    late_rewrites=(*_ON_CPU.late_rewrites, WidenHalfPrecision()),
    dtypes=(*_ON_CPU.dtypes, torch.float16, torch.bfloat16),
)
DIALECTS: Mapping[str, OnnxDialect] = {"cpu": _ON_CPU, "cuda": _ON_CUDA}
"""Type of device -> the dialect of sessions there; on a GPU, the CPU computes ops that the GPU has no kernel for."""
