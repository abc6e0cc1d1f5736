"""Attention in few ops of plain ONNX: the products with their softmax; to a cache, for which ONNX has none, as one.

torch's exporter writes the key's transposition as three ops and looks for NaN after each softmax, which its finite mask
never makes. Attention to a cache is an op of lorac's own in an emitted program, in whose place a target puts its own:
no target claims it, so that a program in which one is left is refused.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import onnx_ir as ir
from onnx import defs
from onnxscript.values import Opset

from lorac.backends.onnx.export.opsets import RecordedOp, op

LORAC_DOMAIN = "lorac"
CACHED_ATTENTION_OP = "CachedAttention"
_FLOATS, _LENGTHS, _INDICES = "T", "L", "P"
_OPERANDS = {
    **dict.fromkeys(("q", "k", "v", "past_k", "past_v"), _FLOATS),
    **dict.fromkeys(("past", "new"), _LENGTHS),
    "places": _INDICES,
    "sinks": _FLOATS,
    "distances": _FLOATS,
}
_OPTIONAL = ("sinks", "distances")
_RESULTS = ("y", "present_k", "present_v")
_ATTRIBUTES = {
    "scale": defs.OpSchema.AttrType.FLOAT,
    "window": defs.OpSchema.AttrType.INT,
    "softcap": defs.OpSchema.AttrType.FLOAT,
}


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
        key, value = (_repeat_heads(kept, query.shape[1]) for kept in (key, value))
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


def _repeat_heads(kept: Any, heads: int) -> Any:
    """Every head of (batch, kept heads, length, size) as often as ``heads`` queries share it."""
    _, shared, _, size = kept.shape
    repeated = op.Expand(op.Unsqueeze(kept, [2]), [1, 1, heads // shared, 1, 1])
    return op.Reshape(repeated, [0, heads, -1, size])


def cached_attention(*operands: Any) -> Any:
    """``lorac::cached_attention`` as that op; the module's path every node bears anyway."""
    *tensors, scale, window, softcap, _ = operands
    return _cached_attention_op()(*tensors, scale=scale, window=window, softcap=softcap)


@functools.cache
def _cached_attention_op() -> RecordedOp:
    parameter, options = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption
    single, optional = options.Single, options.Optional
    schema = defs.OpSchema(
        CACHED_ATTENTION_OP,
        LORAC_DOMAIN,
        1,
        inputs=[
            parameter(name, kind, param_option=optional if name in _OPTIONAL else single)
            for name, kind in _OPERANDS.items()
        ],
        outputs=[parameter(name, _FLOATS) for name in _RESULTS],
        type_constraints=[
            (_FLOATS, ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], ""),
            (_LENGTHS, ["tensor(int32)"], ""),
            (_INDICES, ["tensor(int64)"], ""),
        ],
        attributes=[defs.OpSchema.Attribute(name, kind) for name, kind in _ATTRIBUTES.items()],
    )
    return RecordedOp(Opset(LORAC_DOMAIN, 1), CACHED_ATTENTION_OP, schema)
