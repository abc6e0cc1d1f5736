"""ONNX for lorac's own ops that reach the emitter: one function per op, and what a function cannot say itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from lorac.backends.onnx.export.attention import attention, cached_attention
from lorac.backends.onnx.export.opsets import op
from lorac.ir.graph import attention_ops as attending
from lorac.ir.graph import ops

aten = torch.ops.aten
_MATRIX = 2
_WIDE_DTYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def split_with_sizes(x: Any, sizes: Sequence[Any], dim: int = 0) -> Any:
    """``Split``; torch's own exporter makes a sequence, which is taken apart again for each part.

    Sizes are numbers, or values where a model's own part is as large as an input says.
    """
    if all(isinstance(size, int) for size in sizes):
        told: Any = op.Constant(value_ints=list(sizes))
    else:
        one: Any = op.Constant(value_ints=[1])
        told = op.Concat(*(op.Reshape(_as_value(size), one) for size in sizes), axis=0)
    return op.Split(x, told, axis=dim, num_outputs=len(sizes))


def _as_value(size: Any) -> Any:
    return op.Constant(value_int=size) if isinstance(size, int) else size


def linear(x: Any, weight: Any, bias: Any, site: str) -> Any:
    """As torch's own exporter has ``aten.linear``, so that ONNX Runtime fuses it as it would there."""
    if len(x.shape) == _MATRIX:
        return op.Gemm(x, weight, bias, transB=1)
    y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return y if bias is None else op.Add(y, bias)


def matmul(x: Any, matrix: Any) -> Any:
    """``MatMul``."""
    return op.MatMul(x, matrix)


def conv3d(
    x: Any,
    weight: Any,
    bias: Any = None,
    stride: Sequence[int] = (1, 1, 1),
    padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1),
    groups: int = 1,
) -> Any:
    """``Conv``; torch's own exporter gives one without a bias zeros of another rank, which no runtime takes."""
    pads = [*padding, *padding]
    return op.Conv(x, weight, bias, strides=list(stride), pads=pads, dilations=list(dilation), group=groups)


def rms_norm(x: Any, sizes: Sequence[Any], weight: Any = None, eps: float | None = None) -> Any:
    """The ops that torch decomposes it into, half precision computed in float32; torch's exporter has none for it."""
    wide = x.dtype if x.dtype in _WIDE_DTYPES else ir.DataType.FLOAT
    y = _cast(x, wide)
    axes: Any = op.Constant(value_ints=list(range(-len(sizes), 0)))
    eps = torch.finfo(to_torch_dtype(wide)).eps if eps is None else eps
    mean: Any = op.ReduceMean(op.Pow(y, _scalar(2.0, wide)), axes, keepdims=1)
    y = op.Mul(y, op.Reciprocal(op.Sqrt(op.Add(mean, _scalar(eps, wide)))))
    return _cast(y if weight is None else op.Mul(y, _cast(weight, wide)), x.dtype)


def _cast(x: Any, dtype: ir.DataType) -> Any:
    return x if x.dtype == dtype else op.Cast(x, to=dtype)


def _scalar(number: float, dtype: ir.DataType) -> Any:
    held: Any = ir.tensor(number, dtype)
    return op.Constant(value=held)


def row_positions(ids: Any) -> Any:
    """``Range`` along the last axis, in every row."""
    zero, one = _int_constant(0), _int_constant(1)
    counted: Any = op.Range(zero, op.Squeeze(op.Shape(ids, start=1, end=2)), one)
    return op.Expand(counted, op.Shape(ids))


def gather_rows(x: Any, places: Any) -> Any:
    """``GatherND`` in each row."""
    last: Any = op.Constant(value_ints=[-1])
    return op.GatherND(x, op.Unsqueeze(places, last), batch_dims=1)


def _int_constant(number: int) -> Any:
    return op.Constant(value_int=number)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    ops.SPLIT: split_with_sizes,
    ops.LINEAR: linear,
    ops.MATMUL: matmul,
    aten.conv3d.default: conv3d,
    aten.rms_norm.default: rms_norm,
    aten.scaled_dot_product_attention.default: attention,
    attending.POSITIONS: row_positions,
    attending.ROWS: gather_rows,
    attending.CACHED_ATTENTION: cached_attention,
}
"""Op -> its ONNX."""


def drop_split_counts(model: ir.Model) -> None:
    """torch's builder asks how many parts a ``Split`` has; ONNX allows that only where the sizes are not given."""
    for node in model.graph.all_nodes():
        if node.op_type == "Split" and len(node.inputs) > 1 and node.inputs[1] is not None:
            node.attributes.pop("num_outputs", None)
