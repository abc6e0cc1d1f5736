"""A pass that replaces several ops by one op of ONNX Runtime: RMS norms, rotary positions, and top-k masks.

torch writes a rotary position as seven ops, and a Llama has two per layer. ONNX Runtime's own fusion of RMS norms
expects a quotient, while torch writes a product with ``rsqrt``. A router's top-k mask is twelve ops in torch, whose
``topk`` does not specify the order of equal values; ONNX's ``TopK`` prefers the lowest index, as the router does.

A residual sum and the norm after it stay two ops: on CPUs ONNX Runtime's op for both is slower, for layer norms several
times (``python -m benchmarks.forms``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript.rewriter import pattern
from onnxscript.rewriter._basics import MatchContext
from onnxscript.rewriter.ort_fusions.rms_normalization import RmsNormFusion
from onnxscript.rewriter.pattern import MatchResult

from lorac.backends.onnx.passes import OnnxPass, make_rewrite_pass, module_around, read_numbers
from lorac.ir.graph.graph import Skip
from lorac.ir.graph.passes import PassResult

_Builder = pattern.OpsetPatternBuilder


class _Context(Protocol):
    """onnxscript's builder of the nodes that replace a match: ``op.Add(x, y)``."""

    def __getattr__(self, op: str) -> Callable[..., Any]: ...


@dataclass(frozen=True)
class FuseOps(OnnxPass):
    """Replace the ops of RMS norms, of rotary positions and of a router's top-k mask.

    Attributes:
        top_k: whether masks (``lorac.variants._mixtures.top_k_mask``) become a scatter at the indices of ``TopK``; its
            order of equal values is specified on the CPU alone.
    """

    name: ClassVar[str] = "fuse-ops"
    top_k: bool

    def apply(self, model: ir.Model) -> PassResult:
        """Replace the ops in place; report the matches that stay unchanged."""
        skips: list[Skip] = []
        rules: list[_ReportingRule] = [_RmsNormRule(skips, norm_first) for norm_first in (True, False)]
        rules.append(_RotaryRule(skips))
        if self.top_k:
            rules.append(_TopKRule(skips))
        result = make_rewrite_pass(rule.as_rule() for rule in rules)(model)
        return PassResult(result.modified, tuple(dict.fromkeys(skips)))


class _ReportingRule(pattern.RewriteRuleClassBase):
    """A rule that records the reason why it leaves a match unchanged.

    Args:
        skips: receives the matches that the rule leaves unchanged.
        name: the rule's name.
        remove_nodes: whether the nodes of a match are removed.
    """

    def __init__(self, skips: list[Skip], name: str, *, remove_nodes: bool = True) -> None:
        super().__init__(name=name, remove_nodes=remove_nodes)
        self.skips = skips

    def as_rule(self) -> pattern.RewriteRule:
        """Return the rule as onnxscript applies it."""
        return pattern.RewriteRule(
            self.pattern, self.rewrite, self.check, name=self.name, remove_nodes=self.remove_nodes
        )

    def leave(self, context: MatchContext, why: str) -> MatchResult:
        """Record the reason for leaving a match unchanged, and return that result."""
        self.skips.append(Skip(module_around(context.root), why))
        return MatchResult().fail(why)


class _RmsNormRule(_ReportingRule, RmsNormFusion):
    """onnxscript's rule for RMS norms, limited to scales that are vectors; a scale per row stays a separate product.

    Args:
        skips: as for ``_ReportingRule``.
        norm_first: whether the norm is the first factor of the product with the scale.
    """

    def __init__(self, skips: list[Skip], norm_first: bool) -> None:
        RmsNormFusion.__init__(self, "RmsNorm", norm_first)
        self.skips = skips

    def check(self, op: MatchContext, x: ir.Value, scale: ir.Value, *others: object, **named: object) -> MatchResult:
        if x.shape is None or scale.shape is None or scale.shape.dims != x.shape.dims[-1:]:
            return self.leave(op, "the scale is not a vector along the last axis")
        return super().check(op, x, scale, *others, **named)


class _RotaryRule(_ReportingRule):
    """``x·cos + rotate_half(x)·sin`` of x (batch, heads, length, size), with angles in two equal halves."""

    def __init__(self, skips: list[Skip]) -> None:
        super().__init__(skips, "RotaryEmbedding", remove_nodes=False)  # other nodes use the angles too
        self._shared: dict[tuple[ir.Value, str], ir.Value] = {}

    def pattern(
        self,
        op: _Builder,
        x: object,
        cos: object,
        sin: object,
        zero: object,
        half: object,
        also_half: object,
        end: object,
    ) -> object:
        first, second = op.Slice(x, zero, half, [3], [1]), op.Slice(x, also_half, end, [3], [1])
        rotated = op.Concat(op.Neg(second), first, axis=-1)
        return x * op.Unsqueeze(cos, [1]) + rotated * op.Unsqueeze(sin, [1])

    def check(self, op: MatchContext, x: ir.Value, cos: ir.Value, sin: ir.Value, **bounds: ir.Value) -> MatchResult:
        shapes = [value.shape for value in (x, cos, sin)]
        known = [shape for shape in shapes if shape is not None]
        wide, unknown = x.dtype == ir.DataType.DOUBLE, [len(shape) for shape in known] != [4, 3, 3]
        if wide or unknown or not isinstance(known[0][3], int):
            why = "onnxruntime rotates no float64" if wide else "the shapes of rotary positions are not known"
            return self.leave(op, why)
        (batch, _, _, _), angles, other = known
        size = _last_size(x)
        if angles != other or angles[0] not in (1, batch):
            return self.leave(op, "the angles are neither one table for the batch nor one for each row")
        starts = {"zero": 0, "half": size // 2, "also_half": size // 2}
        if size % 2 or any(_scalar(bounds[name]) != start for name, start in starts.items()):
            return self.leave(op, "the vectors are not rotated by halves")
        if (_scalar(bounds["end"]) or 0) < size or angles[2] != size:
            return self.leave(op, "a part of each vector is not rotated")
        if not (_has_equal_halves(cos) and _has_equal_halves(sin)):
            return self.leave(op, "the halves of the angles may differ")
        return MatchResult()

    def rewrite(self, op: _Context, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: object) -> object:
        half = _last_size(x) // 2
        lookups = [found for table in (cos, sin) if (found := _table_lookup(table)) is not None]
        if len(lookups) == 2 and lookups[0][1] is lookups[1][1]:
            halves = []
            for table, lookup in zip((cos, sin), lookups, strict=True):
                key = (table, str(half))
                if key not in self._shared:  # computed once for all heads and layers
                    self._shared[key] = op.Constant(value=ir.tensor(np.ascontiguousarray(lookup[0][:, :half])))
                halves.append(self._shared[key])
            return op.RotaryEmbedding(x, lookups[0][1], *halves, interleaved=0, _domain="com.microsoft", _version=1)
        zero, two, last = (op.Constant(value_ints=[number]) for number in (0, 2, half))
        flat = op.Constant(value_ints=[-1, half])
        tables = [op.Reshape(op.Slice(table, zero, last, two), flat) for table in (cos, sin)]
        if cos.shape is not None and cos.shape[0] == 1:
            key = (cos, str(x.shape and x.shape[0]))
            if key not in self._shared:  # the rows' positions from 0 on, computed once for all heads and layers
                length = op.Shape(cos, start=1, end=2)
                numbers = op.Range(op.Constant(value_int=0), op.Squeeze(length), op.Constant(value_int=1))
                self._shared[key] = op.Expand(numbers, op.Concat(op.Shape(x, start=0, end=1), length, axis=0))
            positions = self._shared[key]
        else:  # each row of the batch has its own positions: rows of the flattened table
            shape, zero, one = op.Shape(cos, start=0, end=2), op.Constant(value_int=0), op.Constant(value_int=1)
            positions = op.Reshape(op.Range(zero, op.ReduceProd(shape, keepdims=0), one), shape)
        return op.RotaryEmbedding(x, positions, *tables, interleaved=0, _domain="com.microsoft", _version=1)


class _TopKRule(_ReportingRule):
    """The k largest values; of values equal to the k-th largest, those with the lowest indices."""

    def __init__(self, skips: list[Skip]) -> None:
        super().__init__(skips, "TopK")

    def pattern(self, op: _Builder, x: object, least: object, last: object, minus: object, k: object) -> object:
        above, equal = op.Greater(x, least), op.Equal(x, least)
        count = op.ReduceSum(op.Cast(above), last, keepdims=1)
        left = op.Add(op.Mul(count, minus), k)
        return op.Or(above, op.And(equal, op.LessOrEqual(op.CumSum(op.Cast(equal), minus), left)))

    def check(
        self, op: MatchContext, x: ir.Value, least: ir.Value, last: ir.Value, minus: ir.Value, k: ir.Value
    ) -> MatchResult:
        top = _kth_largest(least)
        expected = (x, _scalar(k), -1, -1)
        if top is None or expected != (top.inputs[0], _scalar(top.inputs[1]), _scalar(last), _scalar(minus)):
            return self.leave(op, "it does not choose the k largest values")
        return MatchResult()

    def rewrite(self, op: _Context, x: ir.Value, least: ir.Value, **_: object) -> object:
        top = _kth_largest(least)
        assert top is not None
        _, indices = op.TopK(x, top.inputs[1], axis=-1, largest=1, sorted=1, _outputs=2)
        chosen = op.GreaterOrEqual(indices, op.Constant(value_int=0))
        return op.ScatterElements(op.Less(x, x), indices, chosen, axis=-1)


def _kth_largest(value: ir.Value | None) -> ir.Node | None:
    """Return the ``TopK`` along the last axis of which a value is the k-th largest; None for any other value."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "Slice":
        shape = node.outputs[0].shape
        last = shape is not None and shape[-1] == 1 and _scalar(node.inputs[3]) in (-1, len(shape) - 1)
        return _kth_largest(node.inputs[0]) if last and _scalar(node.inputs[1]) == -1 else None
    if node.op_type == "Identity":
        return _kth_largest(node.inputs[0])
    largest = node.attributes.get_int("axis", -1) == -1 and node.attributes.get_int("largest", 1) == 1
    return node if node.op_type == "TopK" and largest else None


def _table_lookup(value: ir.Value) -> tuple[npt.NDArray[np.generic], ir.Value] | None:
    """Return the constant table (positions, size) from which a value is looked up, and the positions, or None."""
    node = value.producer()
    if node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return None
    table = ir.convenience.get_const_tensor(node.inputs[0]) if node.inputs[0] is not None else None
    positions = node.inputs[1]
    return None if table is None or positions is None or len(table.shape) != 2 else (table.numpy(), positions)


def _last_size(value: ir.Value) -> int:
    size = None if value.shape is None else value.shape[-1]
    assert isinstance(size, int)
    return size


def _scalar(value: ir.Value | None) -> int | None:
    """Return the number in a constant of one element; None for any other value."""
    numbers = read_numbers(value)
    return int(numbers[0]) if len(numbers) == 1 else None


def _has_equal_halves(value: ir.Value) -> bool:
    """Return whether both halves of the last axis are equal: a function of a tensor concatenated with itself."""
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
