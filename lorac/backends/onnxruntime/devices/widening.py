"""Ops that CUDA has no half-precision kernel for, computed in float32 inside a program in half precision."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import onnx
import onnx_ir as ir

from lorac.backends.onnxruntime.devices.cuda_kernels import HALF_PRECISION_OPS, Kernels

_HALF = {ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_DTYPE_AGNOSTIC = frozenset({"Cast", "CastLike", "Constant", "If", "Identity", "Loop", "Scan"})
"""Ops that compute nothing of their own."""


def widen_half_precision(model: ir.Model, kernels: Kernels | None = None) -> None:
    """Have ops that CUDA has no half-precision kernel for compute in float32, in place.

    Their operands are widened, which is exact, and their results rounded once: as torch's own kernels compute, which
    hold in float32 what they read in half precision.

    Args:
        model: as emitted.
        kernels: half precision -> the ops that are computed in it; default: what CUDA has.
    """
    if not any(value.dtype in _HALF for value in (*model.graph.inputs, *model.graph.initializers.values())):
        return
    widening = _CastInserter()
    nodes = [(graph, node) for graph in (model.graph, *model.graph.subgraphs()) for node in graph]
    for _, node in nodes:
        _infer_dtypes(node)
    for graph, node in nodes:
        if (half := _unsupported_dtype(node, HALF_PRECISION_OPS if kernels is None else kernels)) is not None:
            widening.widen(graph, node, half)


def _unsupported_dtype(node: ir.Node, kernels: Kernels) -> ir.DataType | None:
    """The half precision that a node reads, where its op is not computed in that."""
    if node.op_type in _DTYPE_AGNOSTIC:
        return None
    read = {value.dtype for value in node.inputs if value is not None and value.dtype in _HALF}
    op = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
    return next((dtype for dtype in read if op not in kernels.get(_HALF[dtype], ())), None)


def _infer_dtypes(node: ir.Node) -> None:
    """Note the dtypes of a node's results where rewrites left them out: as ONNX has them follow from its operands'."""
    untold = [value for value in node.outputs if value.dtype is None]
    if not untold or not onnx.defs.has(node.op_type, "" if node.domain == "ai.onnx" else node.domain):
        return
    schema = _schema(node.domain, node.op_type)
    last = len(schema.inputs) - 1
    read = {schema.inputs[min(i, last)].type_str: v.dtype for i, v in enumerate(node.inputs) if v is not None}
    own = {
        kind.type_param_str: kind.allowed_type_strs
        for kind in schema.type_constraints
        if len(kind.allowed_type_strs) == 1
    }
    for value in untold:
        kind = schema.outputs[min(value.index() or 0, len(schema.outputs) - 1)].type_str
        found = read.get(kind) or _parse_type(*own.get(kind, [kind]))
        if found is not None:
            value.dtype = found


@functools.cache
def _schema(domain: str, op: str) -> Any:
    return onnx.defs.get_schema(op, domain="" if domain == "ai.onnx" else domain)


def _parse_type(kind: str) -> ir.DataType | None:
    """``INT64`` of ``tensor(int64)``."""
    name = kind.removeprefix("tensor(").removesuffix(")").upper()
    return ir.DataType[name] if name in ir.DataType.__members__ else None


class _CastInserter:
    """Casts around ops, their values named apart from all others of a model, nested graphs among them."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._wide: dict[tuple[int, ir.Value], ir.Value] = {}

    def widen(self, graph: ir.Graph | ir.Function, node: ir.Node, half: ir.DataType) -> None:
        """Have a node compute in float32 what it is to compute in half precision."""
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == half:
                node.replace_input_with(index, self._widened(graph, node, value))
        for old in [value for value in node.outputs if value.dtype == half]:
            self._round(graph, node, old, half)

    def _widened(self, graph: ir.Graph | ir.Function, node: ir.Node, value: ir.Value) -> ir.Value:
        """A value in float32, cast once in each graph that reads it so."""
        key = (id(graph), value)
        if key not in self._wide:
            cast = self._cast(value, ir.DataType.FLOAT, node)
            graph.insert_before(node, cast)
            self._wide[key] = cast.outputs[0]
        return self._wide[key]

    def _round(self, graph: ir.Graph | ir.Function, node: ir.Node, old: ir.Value, half: ir.DataType) -> None:
        """Give those who read a result in half precision what is rounded to it."""
        rounded = self._cast(old, half, node)
        graph.insert_after(node, rounded)
        new = rounded.outputs[0]
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        rounded.replace_input_with(0, old)
        new.name, old.name = old.name, new.name
        old.type = ir.TensorType(ir.DataType.FLOAT)

    def _cast(self, value: ir.Value, to: ir.DataType, like: ir.Node) -> ir.Node:
        made = ir.val(f"in_float_{next(self._numbers)}", type=ir.TensorType(to), shape=value.shape)
        cast = ir.Node("", "Cast", [value], {"to": ir.AttrInt64("to", to)}, outputs=[made])
        cast.metadata_props.update(like.metadata_props)
        return cast
