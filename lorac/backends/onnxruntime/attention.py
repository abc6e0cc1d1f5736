"""Attention as ONNX Runtime computes it in few ops: the products with their softmax, and rotary positions.

torch's exporter writes the key's transposition as three ops and looks for NaN after each softmax, which its finite mask
never makes; together with rotary positions, seven ops a use, that is half of the nodes of a Llama.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
from onnxscript import opset18
from onnxscript.rewriter import pattern

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


class _Rotary(pattern.RewriteRuleClassBase):
    """``x·cos + rotate_half(x)·sin`` of x (batch, heads, length, size), whose angles repeat in their second half."""

    def __init__(self) -> None:
        super().__init__(name="RotaryEmbedding", remove_nodes=False)  # others use the angles too

    def pattern(self, op: Any, x: Any, cos: Any, sin: Any, zero: Any, half: Any, also_half: Any, end: Any) -> Any:
        first, second = op.Slice(x, zero, half, [3], [1]), op.Slice(x, also_half, end, [3], [1])
        turned = op.Concat(op.Neg(second), first, axis=-1)
        return x * op.Unsqueeze(cos, [1]) + turned * op.Unsqueeze(sin, [1])

    def check(self, op: Any, x: Any, cos: Any, sin: Any, **bounds: Any) -> Any:
        result = pattern.MatchResult()
        shapes = [value.shape for value in (x, cos, sin)]
        if None in shapes or [len(shape) for shape in shapes] != [4, 3, 3] or not isinstance(x.shape[3], int):
            return result.fail("shapes are not known", x)
        if cos.shape != sin.shape or cos.shape[0] not in (1, x.shape[0]):
            return result.fail("the angles are not one table for all of the batch, or one for each", cos)
        size = x.shape[3]
        starts = {"zero": 0, "half": size // 2, "also_half": size // 2}
        if size % 2 or any(_number(bounds[name]) != wanted for name, wanted in starts.items()):
            return result.fail("x is not turned by halves", x)
        if (_number(bounds["end"]) or 0) < size or cos.shape[2] != size:
            return result.fail("a part of x is not turned", x)
        return result if _repeats(cos) and _repeats(sin) else result.fail("the angles' halves may differ", cos)

    def rewrite(self, op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
        half = x.shape[3] // 2
        zero, two, last = (op.Constant(value_ints=[number]) for number in (0, 2, half))
        flat = op.Constant(value_ints=[-1, half])
        tables = [op.Reshape(op.Slice(table, zero, last, two), flat) for table in (cos, sin)]
        return op.RotaryEmbedding(x, _rows(op, cos), *tables, interleaved=0, _domain="com.microsoft", _version=1)


def _rows(op: Any, table: Any) -> Any:
    """Which row of the flattened table each position has: those from 0 on, where all of a batch share them."""
    if table.shape[0] == 1:
        return op.Constant(value_ints=[0])
    shape = op.Shape(table, start=0, end=2)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Reshape(op.Range(zero, op.ReduceProd(shape, keepdims=0), one), shape)


def _number(value: ir.Value) -> int | None:
    held = ir.convenience.get_const_tensor(value)
    return int(held.numpy().item()) if held is not None and held.size == 1 else None


def _repeats(value: ir.Value) -> bool:
    """Whether the halves of the last axis are equal: an elementwise function of one tensor joined with itself."""
    node = value.producer()
    if node is None or node.inputs[0] is None:
        return False
    if node.op_type == "Concat":
        halves = node.attributes["axis"].as_int() in (-1, 2) and len(node.inputs) == 2
        return halves and node.inputs[0] is node.inputs[1]
    scalars = all(v is not None and v.shape is not None and v.shape.dims in ((), (1,)) for v in node.inputs[1:])
    return node.op_type in ("Cos", "Sin", "Cast", "Identity", "Mul") and scalars and _repeats(node.inputs[0])


rotary_rules = pattern.RewriteRuleSet([_Rotary.rule()])  # type: ignore[no-untyped-call]  # onnxscript's own
