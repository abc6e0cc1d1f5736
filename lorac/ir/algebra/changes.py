"""Changes in their normal forms: what one adapter, or one mixture, does to one site, as plain tensors.

Everything is a change of the base's output y = x·Wᵀ + b, so that forms add up:

    ========  ==========================================  ==================================
    form      live                                        merged
    ========  ==========================================  ==================================
    LowRank   ``y' = c∘(d∘x)·T·Wᵀ + h∘((g∘x·A)·B)+b+e``   ``W' = c∘W·Tᵀ∘d + h∘(A∘g·B)ᵀ``, ``b' = b + e``
    Sparse    bound W'                                    ``W'[rows, cols] = W + values``, ``b' = b + e``
    Dense     bound W'                                    ``W'``, ``b' = b + e``
    ========  ==========================================  ==================================

c, e, h are (out,), d (in,), g (R,), A (in, R), B (R, out), W (out, in), and T (in, in) is block-diagonal, held as its
blocks (n, k, k). Of stacked matrices, W (E, out, in), every tensor has E in front. A change is immutable; composing
makes a new one, always against the original W, never by subtraction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from lorac.errors import CompileError
from lorac.ir.algebra.operands import BIAS, FOLDABLE, WEIGHT, A, B, C, D, G, H, T

Tensor = torch.Tensor
_MERGEABLE = frozenset({C, D, T})
"""The parts that W' can hold."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """``y' = c∘(W·((d∘x)·T)) + h∘(((x·A)∘g)·B) + b + e``; absent c, d, g, h and T are 1, absent e is 0.

    Attributes:
        a: A (in, R).
        b: B (R, out), every scale folded in but those kept apart.
        parts: what else there is, by its letter (``lorac.ir.algebra.operands``), always carried along whole.
        e: (out,) or None.
    """

    a: Tensor
    b: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    e: Tensor | None = None

    @property
    def rank(self) -> int:
        """R."""
        return self.a.shape[-1]

    def truncated(self, rank: int, power: float = 0.0) -> LowRank:
        """The first ``rank`` components, scaled by (R/rank)^power: what a scale of r^−power is at that rank."""
        if rank >= self.rank:
            return self
        whole, factor = self.folded(), (self.rank / rank) ** power
        return replace(whole, a=whole.a[..., :rank].contiguous(), b=whole.b[..., :rank, :] * factor)

    def folded(self) -> LowRank:
        """The same with g and h folded into B."""
        if not self.parts.keys() & FOLDABLE:
            return self
        b = self.b if G not in self.parts else self.b * self.parts[G][:, None]
        rest = {letter: part for letter, part in self.parts.items() if letter not in FOLDABLE}
        return replace(self, b=b if H not in self.parts else b * self.parts[H], parts=rest)


@dataclass(frozen=True, eq=False)
class Sparse:
    """Values (k,) added to W at (rows, cols); ``e`` (out,) is added to the bias."""

    rows: Tensor
    cols: Tensor
    values: Tensor
    e: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Dense:
    """W' (out, in) itself; ``e`` (out,) is added to the bias."""

    weight: Tensor
    e: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SparseSum:
    """Several sparse terms with strengths, applied in order; indices may overlap."""

    terms: tuple[tuple[float, Sparse], ...]
    e: Tensor | None = None


Change = LowRank | Sparse | SparseSum | Dense


def from_outputs(form: str, outputs: Mapping[str, Tensor], bias: Tensor | None) -> Change:
    """The change of a reduction's outputs.

    Args:
        form: ``Reduction.form``.
        outputs: what the reduction returned.
        bias: the base's bias (out,), or None where it has none.
    """
    new_bias = outputs.get(BIAS)
    delta = None if new_bias is None else new_bias if bias is None else new_bias - bias
    if form == "dense":
        return Dense(outputs[WEIGHT], delta)
    if form == "sparse":
        return Sparse(outputs["rows"], outputs["cols"], outputs["values"], delta)
    parts = {letter: tensor for letter, tensor in outputs.items() if letter not in {A, B, BIAS}}
    return LowRank(outputs[A], outputs[B], parts, delta)


def to_outputs(change: LowRank | Sparse | Dense) -> tuple[str, dict[str, Tensor]]:
    """The inverse of ``from_outputs`` over no bias: the change's form and its tensors by letter."""
    shift = {} if change.e is None else {BIAS: change.e}
    if isinstance(change, Dense):
        return "dense", {WEIGHT: change.weight, **shift}
    if isinstance(change, Sparse):
        return "sparse", {"rows": change.rows, "cols": change.cols, "values": change.values, **shift}
    return "low-rank", {A: change.a, B: change.b, **change.parts, **shift}


def moved(change: Change, device: torch.device) -> Change:
    """A change with its tensors on a device."""
    if isinstance(change, SparseSum):
        terms = [
            (strength, replace(t, rows=t.rows.to(device), cols=t.cols.to(device), values=t.values.to(device)))
            for strength, t in change.terms
        ]
        return SparseSum(tuple(terms), None if change.e is None else change.e.to(device))
    form, outputs = to_outputs(change)
    return from_outputs(form, {letter: tensor.to(device) for letter, tensor in outputs.items()}, None)


def device_of(change: Change) -> torch.device:
    """Where a change's tensors are."""
    if isinstance(change, SparseSum):
        return change.terms[0][1].values.device
    return next(iter(to_outputs(change)[1].values())).device


def compose(terms: Sequence[tuple[float, Change]], weight: Callable[[], Tensor]) -> Change | None:
    """The exact weighted sum W + Σ tᵢ·(W'ᵢ − W) of changes at one site, in the order given.

    Args:
        terms: (strength, change) pairs, sorted by adapter name.
        weight: reads the base W (out, in); called only where a dense sum needs it.
    """
    if not terms:
        return None
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    changes = [change for _, change in terms]
    if all(isinstance(v, LowRank) for v in changes) and _are_summable(changes):  # type: ignore[arg-type]  # all() says so
        return _sum_low_rank(terms)  # type: ignore[arg-type]  # all() says so
    if all(isinstance(v, Sparse) for v in changes):
        return SparseSum(tuple(terms), _weighted_sum([(t, v.e) for t, v in terms]))  # type: ignore[arg-type]  # all() says so
    return _sum_dense(terms, weight())


def merge_weight(change: Change, weight: Tensor) -> Tensor:
    """W' (out, in) in the dtype of W (out, in), a new tensor; computed in the wider of the two dtypes.

    Raises:
        CompileError: the change has a part that no weight holds.
    """
    if isinstance(change, Dense):
        return change.weight.to(weight.dtype, copy=True)
    if isinstance(change, Sparse):
        return add_sparse(weight.clone(), [(1.0, change)])
    if isinstance(change, SparseSum):
        return add_sparse(weight.clone(), change.terms)
    change = change.folded()
    _require_mergeable(change)
    wide = torch.promote_types(weight.dtype, change.a.dtype)
    scaled, parts = weight.to(wide), {letter: part.to(wide) for letter, part in change.parts.items()}
    if T in parts:
        scaled = multiply_blocks(scaled, parts[T].transpose(1, 2))
    if D in parts:
        scaled = scaled * parts[D]
    if C in parts:
        scaled = scaled * parts[C][:, None]
    return add_product(scaled, change.b.mT.to(wide), change.a.mT.to(wide)).to(weight.dtype)


def add_product(weight: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """W + left·right, of matrices (out, R) and (R, in) or of stacks of them; into ``out`` where it is given."""
    product = torch.addmm if weight.dim() == 2 else torch.baddbmm
    return product(weight, left, right, out=out)


def stack_changes(changes: Sequence[Change]) -> LowRank:
    """The changes of stacked matrices as one, E in front of its tensors; methods that adapt stacks are low-rank."""
    pairs = [change for change in changes if isinstance(change, LowRank) and not change.parts]
    assert len(pairs) == len(changes)
    shifts = [change.e for change in pairs if change.e is not None]
    a, b = torch.stack([change.a for change in pairs]), torch.stack([change.b for change in pairs])
    return LowRank(a, b, e=torch.stack(shifts) if shifts else None)


def _require_mergeable(change: LowRank) -> None:
    for letter in change.parts:
        if letter not in _MERGEABLE:
            raise CompileError(
                f"a change with a part '{letter}' has no merged weight",
                next_step="mode='live' runs it beside the weight, alone and at strength 1",
                code="not_mergeable",
            )


def merge_bias(change: Change, bias: Tensor | None) -> Tensor | None:
    """b' (out,), or None where there is neither a base bias nor a change of it."""
    if change.e is None:
        return bias
    return change.e.clone() if bias is None else bias + change.e.to(bias.dtype)


def add_sparse(matrix: Tensor, terms: Sequence[tuple[float, Sparse]]) -> Tensor:
    """Add sparse terms to a matrix (out, in) in place, one after another."""
    for strength, change in terms:
        scaled = change.values if strength == 1 else change.values * strength
        matrix.index_put_((change.rows, change.cols), scaled.to(matrix.dtype), accumulate=True)
    return matrix


def multiply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """x (…, in) times the block-diagonal matrix of ``blocks`` (n, k, k)."""
    number, size, _ = blocks.shape
    cut = x.unflatten(-1, (number, size)).movedim(-2, 0)
    turned = torch.bmm(cut.reshape(number, -1, size), blocks)
    return turned.reshape(cut.shape).movedim(0, -2).flatten(-2)


def identity_blocks(width: int, size: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """The blocks (width/size, size, size) of the identity."""
    return torch.eye(size, dtype=dtype, device=device).expand(width // size, size, size)


def _are_summable(values: Sequence[LowRank]) -> bool:
    """Whether all change outputs, or all inputs in blocks of one size: only then is their sum again c∘W, or W·Tᵀ."""
    letters = {letter for v in values for letter in v.parts}
    sizes = {v.parts[T].shape[-1] for v in values if T in v.parts}
    one_side = C not in letters or not letters & {D, T}
    return one_side and len(sizes) <= 1 and letters <= _MERGEABLE | FOLDABLE


def _sum_low_rank(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    terms = [(t, v.folded()) for t, v in terms]
    a = torch.cat([v.a for _, v in terms], dim=-1)
    b = torch.cat([v.b * t for t, v in terms], dim=-2)
    e = _weighted_sum([(t, v.e) for t, v in terms])
    if any(T in v.parts for _, v in terms):
        return LowRank(a, b, {T: _sum_transforms(terms)}, e)
    scales = {letter: _sum_scales([(t, v.parts.get(letter)) for t, v in terms]) for letter in (C, D)}
    return LowRank(a, b, {letter: scale for letter, scale in scales.items() if scale is not None}, e)


def _sum_transforms(terms: Sequence[tuple[float, LowRank]]) -> Tensor:
    """1 + Σ t·(diag(d)·T − 1)."""
    first = next(v.parts[T] for _, v in terms if T in v.parts)
    number, size, _ = first.shape
    one = identity_blocks(number * size, size, first.dtype, first.device)
    total = one
    for strength, change in terms:
        moved = change.parts.get(T, one)
        if D in change.parts:
            moved = moved * change.parts[D].view(number, size, 1)
        total = total + strength * (moved - one)
    return total


def _sum_scales(terms: Sequence[tuple[float, Tensor | None]]) -> Tensor | None:
    """1 + Σ t·(s − 1)."""
    moved = _weighted_sum([(t, None if s is None else s - 1) for t, s in terms])
    return None if moved is None else moved + 1


def _sum_dense(terms: Sequence[tuple[float, Change]], weight: Tensor) -> Dense:
    wide = torch.promote_types(weight.dtype, torch.float32)
    base = weight.to(wide)
    total = base.clone()
    shift: list[tuple[float, Tensor | None]] = []
    for strength, change in terms:
        total.add_(merge_weight(change, base) - base, alpha=strength)
        shift.append((strength, change.e))
    return Dense(total.to(weight.dtype), _weighted_sum(shift))


def _weighted_sum(terms: Sequence[tuple[float, Tensor | None]]) -> Tensor | None:
    present = [(t, v) for t, v in terms if v is not None]
    if not present:
        return None
    total = present[0][1] * present[0][0]
    for strength, tensor in present[1:]:
        total = total + tensor * strength
    return total
