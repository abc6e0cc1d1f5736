"""Changes of a site by an adapter or a mixture, in normal forms, as plain tensors.

Each is a change of the base's output y = x·Wᵀ + b, so that changes can be added:

    ========  ==========================================  ==================================
    form      live                                        merged
    ========  ==========================================  ==================================
    LowRank   ``y' = c∘(d∘x)·T·Wᵀ + h∘((g∘x·A)·B)+b+e``   ``W' = c∘W·Tᵀ∘d + h∘(A∘g·B)ᵀ``, ``b' = b + e``
    Sparse    bound W'                                    ``W'[rows, cols] = W + values``, ``b' = b + e``
    Delta     bound W'                                    ``W' = W + D``, ``b' = b + e``
    Dense     bound W'                                    ``W'``, ``b' = b + e``
    ========  ==========================================  ==================================

c, e, h are (out,), d (in,), g (R,), A (in, R), B (R, out), W and D (out, in), and T (in, in) is block-diagonal, stored
as its blocks (n, k, k). For stacked matrices, W (E, out, in), every tensor begins with the axis E. A change is
immutable; composing makes a new one, always from the original W, never by subtraction.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lorac.errors import CompileError
from lorac.ir.algebra.operands import BIAS, DELTA, FOLDABLE, MERGEABLE, WEIGHT, A, B, C, D, G, H, T


@dataclass(frozen=True, eq=False)
class LowRank:
    """``y' = c∘(W·((d∘x)·T)) + h∘(((x·A)∘g)·B) + b + e``; absent c, d, g, h and T are 1, absent e is 0.

    Attributes:
        a: A (in, R).
        b: B (R, out), with every scale but g and h folded in.
        scales: the scales c, d, g, h and the transform T that are present, by operand (``lorac.ir.algebra.operands``).
        e: (out,) or None.
    """

    a: Tensor
    b: Tensor
    scales: Mapping[str, Tensor] = field(default_factory=dict)
    e: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank R."""
        return self.a.shape[-1]

    def truncated(self, rank: int, power: float = 0.0) -> "LowRank":
        """Return the first ``rank`` components, times (R/rank)^power, for a method whose scale is r^−power."""
        if rank >= self.rank:
            return self
        folded, factor = self.folded(), (self.rank / rank) ** power
        return replace(folded, a=folded.a[..., :rank].contiguous(), b=folded.b[..., :rank, :] * factor)

    def folded(self) -> "LowRank":
        """Return the change with g and h folded into B."""
        if not self.scales.keys() & FOLDABLE:
            return self
        b = self.b if G not in self.scales else self.b * self.scales[G][:, None]
        rest = {name: scale for name, scale in self.scales.items() if name not in FOLDABLE}
        return replace(self, b=b if H not in self.scales else b * self.scales[H], scales=rest)


@dataclass(frozen=True, eq=False)
class Sparse:
    """Values (k,) added to W at (rows, cols); ``e`` (out,) is added to the bias."""

    rows: Tensor
    cols: Tensor
    values: Tensor
    e: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Delta:
    """A matrix D (out, in) added to W; ``e`` (out,) is added to the bias."""

    delta: Tensor
    e: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Dense:
    """The matrix W' (out, in), which replaces W; ``e`` (out,) is added to the bias."""

    weight: Tensor
    e: Tensor | None = None


@dataclass(frozen=True, eq=False)
class SparseSum:
    """Sparse changes with strengths, applied in order; their indices may overlap."""

    terms: tuple[tuple[float, Sparse], ...]
    e: Tensor | None = None


Change = LowRank | Sparse | SparseSum | Delta | Dense


def factors_of(change: Change) -> tuple[Tensor, Tensor] | None:
    """Return B (out, r), with every scale, and A (r, in) of a change that only adds B·A to W; None otherwise."""
    folded = change.folded() if isinstance(change, LowRank) else None
    return None if folded is None or folded.scales else (folded.b.mT, folded.a.mT)


def from_outputs(form: str, outputs: Mapping[str, Tensor], bias: Tensor | None) -> Change:
    """Convert a reduction's outputs to the change that they describe.

    Args:
        form: ``Reduction.form``.
        outputs: the reduction's result.
        bias: the base's bias (out,), or None.
    """
    new_bias = outputs.get(BIAS)
    delta = None if new_bias is None else new_bias if bias is None else new_bias - bias
    if form == "dense":
        return Dense(outputs[WEIGHT], delta)
    if form == "delta":
        return Delta(outputs[DELTA], delta)
    if form == "sparse":
        return Sparse(outputs["rows"], outputs["cols"], outputs["values"], delta)
    scales = {name: tensor for name, tensor in outputs.items() if name not in {A, B, BIAS}}
    return LowRank(outputs[A], outputs[B], scales, delta)


def to_outputs(change: LowRank | Sparse | Delta | Dense) -> tuple[str, dict[str, Tensor]]:
    """Convert a change without a base bias to its form and its tensors by operand; the inverse of ``from_outputs``."""
    shift = {} if change.e is None else {BIAS: change.e}
    if isinstance(change, LowRank):
        return "low-rank", {A: change.a, B: change.b, **change.scales, **shift}
    if isinstance(change, Dense):
        return "dense", {WEIGHT: change.weight, **shift}
    if isinstance(change, Delta):
        return "delta", {DELTA: change.delta, **shift}
    return "sparse", {"rows": change.rows, "cols": change.cols, "values": change.values, **shift}


def list_tensors(change: Change) -> list[Tensor]:
    """Return the tensors of a change."""
    if isinstance(change, LowRank):
        return [change.a, change.b, *change.scales.values(), *([] if change.e is None else [change.e])]
    if not isinstance(change, SparseSum):
        return [*to_outputs(change)[1].values()]
    own = [tensor for _, term in change.terms for tensor in list_tensors(term)]
    return own if change.e is None else [change.e, *own]


def map_tensors(edit: Callable[[Tensor], Tensor], change: Change) -> Change:
    """Replace every tensor of a change by the result of ``edit``; return the new change."""
    if isinstance(change, LowRank):
        scales = {name: edit(scale) for name, scale in change.scales.items()}
        return LowRank(edit(change.a), edit(change.b), scales, None if change.e is None else edit(change.e))
    if isinstance(change, SparseSum):  # the sum has one ``e`` for all terms
        terms = tuple((t, Sparse(edit(v.rows), edit(v.cols), edit(v.values))) for t, v in change.terms)
        return SparseSum(terms, None if change.e is None else edit(change.e))
    form, outputs = to_outputs(change)
    return from_outputs(form, {name: edit(tensor) for name, tensor in outputs.items()}, None)


def compose(terms: Sequence[tuple[float, Change]], weight: Callable[[], Tensor]) -> Change | None:
    """Return the exact weighted sum W + Σ tᵢ·(W'ᵢ − W) of changes at one site, in the given order.

    Args:
        terms: (strength, change) pairs, sorted by adapter name.
        weight: reads the base W (out, in); called only for a dense sum.
    """
    if not terms:
        return None
    if len(terms) == 1 and terms[0][0] == 1:
        return terms[0][1]
    low_rank = [(t, change) for t, change in terms if isinstance(change, LowRank)]
    if len(low_rank) == len(terms) and are_summable([change for _, change in low_rank]):
        return _sum_low_rank(low_rank)
    sparse = [(t, change) for t, change in terms if isinstance(change, Sparse)]
    if len(sparse) == len(terms):
        return SparseSum(tuple(sparse), _weighted_sum([(t, change.e) for t, change in sparse]))
    deltas = [(t, change) for t, change in terms if isinstance(change, Delta)]
    if len(deltas) == len(terms):
        total = _weighted_sum([(t, change.delta) for t, change in deltas])
        assert total is not None
        return Delta(total, _weighted_sum([(t, change.e) for t, change in deltas]))
    matrix = weight()
    base = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    dense = base.clone()
    for strength, change in terms:
        dense.add_(merge_weight(change, base) - base, alpha=strength)
    return Dense(dense.to(matrix.dtype), _weighted_sum([(t, change.e) for t, change in terms]))


def merge_weight(change: Change, weight: Tensor) -> Tensor:
    """Return W' (out, in) as a new tensor in the dtype of W (out, in), computed in the wider dtype of change and W.

    Raises:
        CompileError: the change has a scale that a weight cannot hold.
    """
    if isinstance(change, Dense):
        return change.weight.to(weight.dtype, copy=True)
    if isinstance(change, Sparse):
        return add_sparse(weight.clone(), [(1.0, change)])
    if isinstance(change, SparseSum):
        return add_sparse(weight.clone(), change.terms)
    wide = torch.promote_types(weight.dtype, (change.delta if isinstance(change, Delta) else change.a).dtype)
    if isinstance(change, Delta):
        return (weight.to(wide) + change.delta.to(wide)).to(weight.dtype)
    change = change.folded()
    for name in sorted(change.scales.keys() - MERGEABLE):
        raise CompileError(
            f"a change with the operand '{name}' cannot be merged into a weight",
            next_step="run it next to the weight with mode='live', alone and at strength 1",
            code="not_mergeable",
        )
    scaled, scales = weight.to(wide), {name: scale.to(wide) for name, scale in change.scales.items()}
    if T in scales:
        scaled = multiply_blocks(scaled, scales[T].transpose(1, 2))
    if D in scales:
        scaled = scaled * scales[D]
    if C in scales:
        scaled = scaled * scales[C][:, None]
    return add_product(scaled, change.b.mT.to(wide), change.a.mT.to(wide)).to(weight.dtype)


def add_product(weight: Tensor, left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return W + left·right of matrices (out, R) and (R, in), or of stacks of them; write it to ``out`` if given."""
    product = torch.addmm if weight.dim() == 2 else torch.baddbmm
    return product(weight, left, right, out=out)


def stack_changes(changes: Sequence[Change]) -> LowRank | Delta:
    """Stack the changes of E matrices along a first axis; all are plain pairs, or all are added matrices."""
    shifts = [change.e for change in changes if change.e is not None]
    e = torch.stack(shifts) if shifts else None
    if all(isinstance(change, Delta) for change in changes):
        return Delta(torch.stack([change.delta for change in changes if isinstance(change, Delta)]), e)
    pairs = [change for change in changes if isinstance(change, LowRank) and not change.scales]
    assert len(pairs) == len(changes)
    return LowRank(torch.stack([pair.a for pair in pairs]), torch.stack([pair.b for pair in pairs]), e=e)


def merge_bias(change: Change, bias: Tensor | None) -> Tensor | None:
    """Return b' (out,); None if neither the base has a bias nor the change a shift."""
    if change.e is None:
        return bias
    return change.e.clone() if bias is None else bias + change.e.to(bias.dtype)


def add_sparse(matrix: Tensor, terms: Sequence[tuple[float, Sparse]]) -> Tensor:
    """Add sparse terms to a matrix (out, in) in place, in order."""
    for strength, change in terms:
        scaled = change.values if strength == 1 else change.values * strength
        matrix.index_put_((change.rows, change.cols), scaled.to(matrix.dtype), accumulate=True)
    return matrix


def multiply_blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Multiply x (…, in) by the block-diagonal matrix with the blocks (n, k, k).

    For x of segments (D, tokens, in) with a matrix each, the blocks are (D, n, k, k).
    """
    number, size, _ = blocks.shape[-3:]
    if blocks.dim() > 3:
        return torch.matmul(x.unflatten(-1, (number, size)).transpose(1, 2), blocks).transpose(1, 2).flatten(-2)
    split = x.unflatten(-1, (number, size)).movedim(-2, 0)
    product = torch.bmm(split.reshape(number, -1, size), blocks)
    return product.reshape(split.shape).movedim(0, -2).flatten(-2)


def identity_blocks(width: int, size: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
    """Return the blocks (width/size, size, size) of the identity."""
    return torch.eye(size, dtype=dtype, device=device).expand(width // size, size, size)


def are_summable(changes: Sequence[LowRank]) -> bool:
    """Return whether the sum has one form, c∘W or W·Tᵀ: only outputs change, or only inputs in blocks of one size."""
    names = {name for change in changes for name in change.scales}
    sizes = {change.scales[T].shape[-1] for change in changes if T in change.scales}
    one_side = C not in names or not names & {D, T}
    return one_side and len(sizes) <= 1 and names <= MERGEABLE | FOLDABLE


def _sum_low_rank(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    terms = [(t, v.folded()) for t, v in terms]
    a = torch.cat([v.a for _, v in terms], dim=-1)
    b = torch.cat([v.b * t for t, v in terms], dim=-2)
    e = _weighted_sum([(t, v.e) for t, v in terms])
    transforms = [v.scales[T] for _, v in terms if T in v.scales]
    if transforms:  # 1 + Σ t·(diag(d)·T − 1)
        number, size, _ = transforms[0].shape
        total = one = identity_blocks(number * size, size, transforms[0].dtype, transforms[0].device)
        for strength, change in terms:
            transform = change.scales.get(T, one)
            if D in change.scales:
                transform = transform * change.scales[D].view(number, size, 1)
            total = total + strength * (transform - one)
        return LowRank(a, b, {T: total}, e)
    scales: dict[str, Tensor] = {}
    for name in (C, D):  # 1 + Σ t·(s − 1)
        difference = _weighted_sum([(t, v.scales[name] - 1) for t, v in terms if name in v.scales])
        scales |= {} if difference is None else {name: difference + 1}
    return LowRank(a, b, scales, e)


def _weighted_sum(terms: Sequence[tuple[float, Tensor | None]]) -> Tensor | None:
    present = [(t, v) for t, v in terms if v is not None]
    if not present:
        return None
    total = present[0][1] * present[0][0]
    for strength, tensor in present[1:]:
        total = total + tensor * strength
    return total
