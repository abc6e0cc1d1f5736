"""ONNX for the dialect's ops that reach the emitter: one function per op, and what a function cannot say itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import fx

from lorac.ir import ops
from lorac.ir.graph import Graph, Level
from lorac.ir.verify import verify

_MATRIX = 2


def split_ranks(u: Any, ranks: Any, pairs: Sequence[Any]) -> Any:
    """``Split`` by a tensor of sizes: ranks change with the adapter, the graph does not."""
    return op.Split(u, ranks, axis=-1, num_outputs=len(pairs))


def linear(x: Any, weight: Any, bias: Any, site: str) -> Any:
    """As torch's own exporter has ``aten.linear``, so that ONNX Runtime fuses it as it would there."""
    if len(x.shape) == _MATRIX:
        return op.Gemm(x, weight, bias, transB=1)
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return y if bias is None else op.Add(y, bias)


def matmul(x: Any, matrix: Any) -> Any:
    """``MatMul``."""
    return op.MatMul(x, matrix)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    ops.SPLIT_RANKS: split_ranks,
    ops.LINEAR: linear,
    ops.MATMUL: matmul,
}
"""Op -> its ONNX."""


def legalize(graph: Graph) -> None:
    """expanded -> target: products with a matrix become the dialect's own, which reach the emitter whole.

    torch's exporter decomposes ``aten.linear`` and ``aten.matmul`` for every shape anew just to learn the result's; of
    a graph with symbolic ranks that is half of the whole export.
    """
    for node in graph.fx.nodes:
        if node.op != "call_function" or node.target not in _PRODUCTS:
            continue
        if node.args[1].meta["val"].dim() == _MATRIX and node.args[0].meta["val"].dim() >= _MATRIX:
            node.target, node.args = _PRODUCTS[node.target](*node.args)
    graph.level = Level.TARGET
    verify(graph, after="legalize")


def _linear(x: fx.Node, weight: fx.Node, bias: fx.Node | None = None) -> tuple[Any, tuple[Any, ...]]:
    return ops.LINEAR, (x, weight, bias, "")


def _matmul(x: fx.Node, matrix: fx.Node) -> tuple[Any, tuple[Any, ...]]:
    return ops.MATMUL, (x, matrix)


_PRODUCTS: dict[Any, Callable[..., tuple[Any, tuple[Any, ...]]]] = {
    torch.ops.aten.linear.default: _linear,
    torch.ops.aten.matmul.default: _matmul,
}


def settle(model: ir.Model) -> None:
    """torch's builder asks how many parts a ``Split`` has; ONNX allows that only where the sizes are not given."""
    for node in model.graph.all_nodes():
        if node.op_type == "Split" and len(node.inputs) > 1 and node.inputs[1] is not None:
            node.attributes.pop("num_outputs", None)
