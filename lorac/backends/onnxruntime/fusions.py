"""Few ops for what torch writes in many: rotary positions, RMS norms, and which k of the last axis are largest.

Rotary positions are seven ops a use, of which a Llama has two a layer. RMS norms become one op here: ONNX Runtime's own
fusion looks for a quotient, where torch has a product with ``rsqrt``. A router's choice is twelve ops in torch, which
does not say whom its ``topk`` prefers among equals; ONNX's ``TopK`` prefers the lowest index, as the router does.

A residual sum and the norm behind it stay two ops: ONNX Runtime's op for both takes longer on CPUs than they do, with
layer norms several times as long (``python -m benchmarks.forms``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter.ort_fusions.rms_normalization import RmsNormFusion

from lorac.backends.onnx.pattern_pass import make_rewrite_pass


def fuse_rms_norms(model: ir.Model) -> None:
    """RMS norms as ``SimplifiedLayerNormalization``, in place."""
    rules = [_RmsNormRule.rule(first) for first in (True, False)]  # type: ignore[no-untyped-call]  # onnxscript's own
    make_rewrite_pass(rules)(model)


def fuse_rotary_positions(model: ir.Model) -> None:
    """Rotary positions as ``com.microsoft::RotaryEmbedding``, in place."""
    make_rewrite_pass([_RotaryRule.rule()])(model)  # type: ignore[no-untyped-call]  # onnxscript's own


def fuse_top_k(model: ir.Model) -> None:
    """A router's choice of k (``lorac/variants/_mixtures.py``) as ``TopK``'s places scattered into a mask, in place."""
    make_rewrite_pass([_TopKRule.rule()])(model)  # type: ignore[no-untyped-call]  # onnxscript's own


class _RmsNormRule(pattern.RewriteRuleClassBase):
    """onnxscript's rule for RMS norms, where the scale is a vector: a scale for each row is a product of its own.

    Args:
        first: whether the norm is the first factor of the product with the scale.
    """

    def __init__(self, first: bool) -> None:
        super().__init__(name="RmsNorm")
        self._theirs: Any = RmsNormFusion("RmsNorm", first)

    def pattern(self, op: Any, x: Any, scale: Any, epsilon: Any, compute_dtype: Any, target_dtype: Any) -> Any:
        return self._theirs.pattern(op, x, scale, epsilon, compute_dtype, target_dtype)

    def check(self, op: Any, x: Any, scale: Any, **others: Any) -> Any:
        if None in (x.shape, scale.shape) or scale.shape.dims != x.shape.dims[-1:]:
            return pattern.MatchResult().fail("the scale is no vector along the last axis", scale)
        return self._theirs.check(op, x=x, scale=scale, **others)

    def rewrite(self, op: Any, **values: Any) -> Any:
        return self._theirs.rewrite(op, **values)


class _RotaryRule(pattern.RewriteRuleClassBase):
    """``x·cos + rotate_half(x)·sin`` of x (batch, heads, length, size), whose angles repeat in their second half."""

    def __init__(self) -> None:
        super().__init__(name="RotaryEmbedding", remove_nodes=False)  # others use the angles too
        self._shared: dict[tuple[ir.Value, str], Any] = {}

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
        if size % 2 or any(_scalar(bounds[name]) != wanted for name, wanted in starts.items()):
            return result.fail("x is not turned by halves", x)
        if (_scalar(bounds["end"]) or 0) < size or cos.shape[2] != size:
            return result.fail("a part of x is not turned", x)
        return (
            result
            if _has_equal_halves(cos) and _has_equal_halves(sin)
            else result.fail("the angles' halves may differ", cos)
        )

    def rewrite(self, op: Any, x: Any, cos: Any, sin: Any, **_: Any) -> Any:
        half = x.shape[3] // 2
        places = [found[1] for table in (cos, sin) if (found := _table_lookup(table)) is not None]
        if len(places) == 2 and places[0] is places[1]:
            halves = (self._half(op, table, half) for table in (cos, sin))
            return op.RotaryEmbedding(x, places[0], *halves, interleaved=0, _domain="com.microsoft", _version=1)
        zero, two, last = (op.Constant(value_ints=[number]) for number in (0, 2, half))
        flat = op.Constant(value_ints=[-1, half])
        tables = [op.Reshape(op.Slice(table, zero, last, two), flat) for table in (cos, sin)]
        rows = self._shared_rows(op, x, cos) if cos.shape[0] == 1 else _positions_per_row(op, cos)
        return op.RotaryEmbedding(x, rows, *tables, interleaved=0, _domain="com.microsoft", _version=1)

    def _half(self, op: Any, value: ir.Value, half: int) -> Any:
        """The first columns of the table that a value is looked up in; made once for all heads and layers."""
        key = (value, str(half))
        found = _table_lookup(value)
        if key not in self._shared and found is not None:
            self._shared[key] = op.Constant(value=ir.tensor(np.ascontiguousarray(found[0][:, :half])))
        return self._shared[key]

    def _shared_rows(self, op: Any, x: Any, table: Any) -> Any:
        """Positions (batch, length) from 0 on, the same in every row; made once for all heads and layers of a table."""
        key = (table, str(x.shape[0]))
        if key not in self._shared:
            zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
            length = op.Shape(table, start=1, end=2)
            positions = op.Range(zero, op.Squeeze(length), one)
            self._shared[key] = op.Expand(positions, op.Concat(op.Shape(x, start=0, end=1), length, axis=0))
        return self._shared[key]


class _TopKRule(pattern.RewriteRuleClassBase):
    """What is above the k-th largest, and of its equals those with the lowest indices until there are k."""

    def pattern(self, op: Any, x: Any, least: Any, last: Any, minus: Any, k: Any) -> Any:
        above, equal = op.Greater(x, least), op.Equal(x, least)
        taken = op.ReduceSum(op.Cast(above), last, keepdims=1)
        left = op.Add(op.Mul(taken, minus), k)
        return op.Or(above, op.And(equal, op.LessOrEqual(op.CumSum(op.Cast(equal), minus), left)))

    def check(self, op: Any, x: Any, least: Any, last: Any, minus: Any, k: Any) -> Any:
        result, found = pattern.MatchResult(), _kth_largest(least)
        wanted = (x, _scalar(k), -1, -1)
        if found is None or wanted != (found.inputs[0], _scalar(found.inputs[1]), _scalar(last), _scalar(minus)):
            return result.fail("it is no choice of the k largest", x)
        return result

    def rewrite(self, op: Any, x: Any, least: Any, **_: Any) -> Any:
        found: Any = _kth_largest(least)
        _, places = op.TopK(x, found.inputs[1], axis=-1, largest=1, sorted=1, _outputs=2)
        chosen = op.GreaterOrEqual(places, op.Constant(value_int=0))
        return op.ScatterElements(op.Less(x, x), places, chosen, axis=-1)


def _kth_largest(value: ir.Value | None) -> ir.Node | None:
    """The ``TopK`` along the last axis whose last value this is; None where it is something else."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "Identity" or (node.op_type == "Slice" and _is_last_slice(node)):
        return _kth_largest(node.inputs[0])
    largest = node.attributes.get_int("axis", -1) == -1 and node.attributes.get_int("largest", 1) == 1
    return node if node.op_type == "TopK" and largest else None


def _is_last_slice(node: ir.Node) -> bool:
    """Whether a ``Slice`` takes the last value along the last axis."""
    shape = node.outputs[0].shape
    along = () if shape is None else (-1, len(shape) - 1)
    return _scalar(node.inputs[1]) == -1 and _scalar(node.inputs[3]) in along and shape is not None and shape[-1] == 1


def _positions_per_row(op: Any, table: Any) -> Any:
    """Positions (batch, length) as rows of the flattened table, of which every row of the batch has its own."""
    shape = op.Shape(table, start=0, end=2)
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Reshape(op.Range(zero, op.ReduceProd(shape, keepdims=0), one), shape)


def _table_lookup(value: ir.Value) -> tuple[Any, ir.Value] | None:
    """The constant table (positions, size) that a value is looked up in, and the places; None where it is not."""
    node = value.producer()
    if node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    table = ir.convenience.get_const_tensor(node.inputs[0]) if node.inputs[0] is not None else None
    places = node.inputs[1]
    return None if table is None or places is None or len(table.shape) != 2 else (table.numpy(), places)


def _scalar(value: ir.Value | None) -> int | None:
    held = None if value is None else ir.convenience.get_const_tensor(value)
    return int(held.numpy().item()) if held is not None and held.size == 1 else None


def _has_equal_halves(value: ir.Value) -> bool:
    """Whether the halves of the last axis are equal: an elementwise function of one tensor joined with itself."""
    node = value.producer()
    if node is None or node.inputs[0] is None:
        return False
    if (found := _table_lookup(value)) is not None:
        first, second = np.array_split(found[0], 2, axis=-1)
        return np.array_equal(first, second)
    if node.op_type == "Concat":
        halves = node.attributes["axis"].as_int() in (-1, 2) and len(node.inputs) == 2
        return halves and node.inputs[0] is node.inputs[1]
    scalars = all(v is not None and v.shape is not None and v.shape.dims in ((), (1,)) for v in node.inputs[1:])
    return node.op_type in ("Cos", "Sin", "Cast", "Identity", "Mul") and scalars and _has_equal_halves(node.inputs[0])
