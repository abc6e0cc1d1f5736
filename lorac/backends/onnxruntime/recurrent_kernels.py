"""ONNX Runtime lists kernels for recurrent layers in float64 that compute nothing: they raise once they are called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lorac.backends.onnx.claims import describe_origin
from lorac.backends.onnx.passes import OnnxPass
from lorac.errors import Unavailable
from lorac.ir.graph.passes import PassResult

_RECURRENT = frozenset({"LSTM", "GRU"})


@dataclass(frozen=True)
class CheckRecurrentKernels(OnnxPass):
    """Refuse recurrent layers in float64 before a session is made."""

    name: ClassVar[str] = "check-recurrent-kernels"

    def apply(self, model: ir.Model) -> PassResult:
        """Change nothing.

        Raises:
            Unavailable: naming the layer.
        """
        for node in model.graph.all_nodes():
            read = node.inputs if node.op_type in _RECURRENT else ()
            if any(value is not None and value.dtype == ir.DataType.DOUBLE for value in read):
                raise Unavailable(
                    f"onnxruntime has no kernel for {node.op_type} in float64{describe_origin(node.metadata_props)}",
                    next_step="dtype='float32' computes in float32; target='eager' computes in the model's own dtype",
                )
        return PassResult(changed=False)
