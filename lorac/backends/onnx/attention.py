"""Attention in few ops of plain ONNX: the products with their softmax.

torch's exporter writes the key's transposition as three ops and looks for NaN after each softmax, which its finite mask
never makes.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript import opset18

op: Any = opset18  # typed for tensors alone, where its tracer takes numbers too


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """``aten.scaled_dot_product_attention`` outside training: a row that attends to nothing answers 0, as in torch."""
    rank, scale = len(query.shape), 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        key, value = (_repeated(kept, query.shape[1]) for kept in (key, value))
    if is_causal:
        attn_mask = op.GreaterOrEqual(op.Unsqueeze(_positions(query), [1]), _positions(key))
    transposed = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, _scalar(scale, query)), transposed)
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    zero, lowest = _scalar(0.0, query), _scalar(query.dtype.min, query)
    if is_causal or attn_mask.dtype == ir.DataType.BOOL:
        hidden = op.Where(attn_mask, zero, lowest)
        attends = op.Cast(op.ReduceMax(op.Cast(attn_mask, to=ir.DataType.INT32), [-1]), to=ir.DataType.BOOL)
    else:
        hidden = attn_mask
        attends = op.Greater(op.ReduceMax(attn_mask, [-1]), _scalar(-math.inf, query))
    answered = op.MatMul(op.Softmax(op.Add(scores, hidden), axis=-1), value)
    return answered if is_causal else op.Where(attends, answered, zero)


def _scalar(number: float, like: Any) -> Any:
    return op.Constant(value=ir.tensor(number, dtype=like.dtype))


def _positions(rows: Any) -> Any:
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Range(zero, op.Squeeze(op.Shape(rows, start=-2, end=-1)), one)


def _repeated(kept: Any, heads: int) -> Any:
    """Every head of (batch, kept heads, length, size) as often as ``heads`` queries share it."""
    _, shared, _, size = kept.shape
    repeated = op.Expand(op.Unsqueeze(kept, [2]), [1, 1, heads // shared, 1, 1])
    return op.Reshape(repeated, [0, heads, -1, size])
