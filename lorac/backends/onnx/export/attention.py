"""Attention as few ONNX ops: the products and their softmax. Attention over a cache is one op of lorac's domain.

torch's exporter writes the key's transposition as three ops, and checks for NaN after each softmax, which a finite mask
never produces. ONNX has no op for attention over a cache: each target replaces lorac's op by its own. If one is left,
the program is refused, since no target claims it.
"""

import math

import onnx_ir as ir
from onnx import defs
from onnxscript.values import Opset

from lorac.backends.onnx.export.opsets import Outputs, RecordedOp, op

LORAC_DOMAIN = "lorac"
CACHED_ATTENTION_OP = "CachedAttention"
_FLOATS, _LENGTHS, _INDICES = "T", "L", "P"
_OPERANDS = {
    **dict.fromkeys(("q", "k", "v", "past_k", "past_v"), _FLOATS),
    **dict.fromkeys(("past", "new"), _LENGTHS),
    "places": _INDICES,
    "sinks": _FLOATS,
    "distances": _FLOATS,
    "blocks": _INDICES,
}
_OPTIONAL = ("sinks", "distances", "blocks")
_PARAMETER, _OPTION = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption
_CACHED_ATTENTION = RecordedOp(
    Opset(LORAC_DOMAIN, 1),
    CACHED_ATTENTION_OP,
    defs.OpSchema(
        CACHED_ATTENTION_OP,
        LORAC_DOMAIN,
        1,
        inputs=[
            _PARAMETER(name, kind, param_option=_OPTION.Optional if name in _OPTIONAL else _OPTION.Single)
            for name, kind in _OPERANDS.items()
        ],
        outputs=[_PARAMETER(name, _FLOATS) for name in ("y", "present_k", "present_v")],
        type_constraints=[
            (_FLOATS, ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], ""),
            (_LENGTHS, ["tensor(int32)"], ""),
            (_INDICES, ["tensor(int64)"], ""),
        ],
        attributes=[
            defs.OpSchema.Attribute("scale", defs.OpSchema.AttrType.FLOAT),
            defs.OpSchema.Attribute("window", defs.OpSchema.AttrType.INT),
            defs.OpSchema.Attribute("softcap", defs.OpSchema.AttrType.FLOAT),
        ],
    ),
)


def attention(
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Outputs:
    """Write ``aten.scaled_dot_product_attention`` outside of training; as in torch, a row without keys gives 0."""
    assert query.shape is not None
    assert query.dtype is not None
    rank, scale = len(query.shape), 1 / math.sqrt(fixed_size(query, -1)) if scale is None else scale
    if enable_gqa:
        heads, repeated = fixed_size(query, 1), []
        for operand in (key, value):  # (batch, key heads, length, size): once per query head
            each = op.Expand(op.Unsqueeze(operand, [2]), [1, 1, heads // fixed_size(operand, 1), 1, 1])
            repeated.append(op.Reshape(each, [0, heads, -1, fixed_size(operand, 3)]))
        key, value = repeated
    if is_causal:
        attn_mask = op.GreaterOrEqual(op.Unsqueeze(_positions(query), [1]), _positions(key))
    transposed = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, _scalar(scale, query)), transposed)
    if attn_mask is None:
        return op.MatMul(op.Softmax(scores, axis=-1), value)
    zero, lowest = _scalar(0.0, query), _scalar(float(query.dtype.min), query)
    if is_causal or attn_mask.dtype == ir.DataType.BOOL:
        hidden = op.Where(attn_mask, zero, lowest)
        attends = op.Cast(op.ReduceMax(op.Cast(attn_mask, to=ir.DataType.INT32), [-1]), to=ir.DataType.BOOL)
    else:
        hidden = attn_mask
        attends = op.Greater(op.ReduceMax(attn_mask, [-1]), _scalar(-math.inf, query))
    attended = op.MatMul(op.Softmax(op.Add(scores, hidden), axis=-1), value)
    return attended if is_causal else op.Where(attends, attended, zero)


def fixed_size(value: ir.Value, axis: int) -> int:
    """Return the size of an axis, which must not be dynamic."""
    assert value.shape is not None
    size = value.shape[axis]
    assert isinstance(size, int)
    return size


def _scalar(number: float, like: ir.Value) -> ir.Value:
    return op.Constant(value=ir.tensor(number, dtype=like.dtype))


def _positions(rows: ir.Value) -> ir.Value:
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Range(zero, op.Squeeze(op.Shape(rows, start=-2, end=-1)), one)


def cached_attention(*operands: object) -> Outputs:
    """Write ``lorac::cached_attention`` as an op of lorac's domain, without the path, which is in the metadata."""
    *tensors, scale, window, softcap, _ = operands
    return _CACHED_ATTENTION(*tensors, scale=scale, window=window, softcap=softcap)
