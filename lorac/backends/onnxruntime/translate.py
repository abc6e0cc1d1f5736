"""ONNX for the dialect's ops that reach the emitter: one function per op, and what a function cannot say itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset18 as op

from lorac.ir import ops


def split_ranks(u: Any, ranks: Any, pairs: Sequence[Any]) -> Any:
    """``Split`` by a tensor of sizes: ranks change with the adapter, the graph does not."""
    return op.Split(u, ranks, axis=-1, num_outputs=len(pairs))


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {ops.SPLIT_RANKS: split_ranks}
"""Op -> its ONNX."""


def settle(model: ir.Model) -> None:
    """torch's builder asks how many parts a ``Split`` has; ONNX allows that only where the sizes are not given."""
    for node in model.graph.all_nodes():
        if node.op_type == "Split" and len(node.inputs) > 1 and node.inputs[1] is not None:
            node.attributes.pop("num_outputs", None)
