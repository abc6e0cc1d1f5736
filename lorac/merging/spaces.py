"""Spaces in which changes are combined entry by entry.

``deltas``: the whole changes W' − W. ``factors``: A and B of LoRAs, each separately and unscaled, as PEFT's
``add_weighted_adapter`` combines them. ``knots``: the parts Rᵢ of [Δ₁ | … | Δ_N] = U·[R₁ | … | R_N] in one basis U
(Stoica et al. 2024, arXiv 2410.19735). ``core``: the cores Mᵢ of Δᵢ = U·Mᵢ·V in two bases (Panariello et al. 2025,
arXiv 2509.17786). The last two represent every change exactly and never form a matrix as large as W.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lorac.errors import ChoiceError
from lorac.ir.algebra.changes import Change, Delta, Dense, LowRank, are_summable, compose
from lorac.merging.terms import SiteTerms, refuse_weight

Combine = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Function (tensors (N, …), their weights (N,), random generator) -> one tensor (…)."""


def merge_deltas(combine: Combine, terms: SiteTerms) -> Change:
    """Combine the whole changes W' − W."""
    weights = terms.deltas.new_tensor(terms.weights)
    return Delta(combine(terms.deltas, weights, terms.generator), _merge_shifts(combine, terms))


def merge_factors(combine: Combine, terms: SiteTerms) -> Change:
    """Combine all A and all B; each is multiplied by the root of weight · scale, and A gets the weight's sign.

    Raises:
        ChoiceError: the ranks differ.
    """
    pairs = terms.scaled_pairs()
    ranks = sorted({pair.a.shape[-2] for pair in pairs if pair is not None})
    if len(ranks) > 1:
        raise ChoiceError(
            f"the factors at '{terms.path}' have different ranks, {', '.join(map(str, ranks))}, and cannot be added",
            next_step="give space='deltas', which takes any ranks, or change one by lorac.to_lora(adapter, rank=…)",
        )
    first = next(pair for pair in pairs if pair is not None)
    strengths = first.a.new_tensor(
        [weight * (0 if pair is None else pair.scale) for pair, weight in zip(pairs, terms.weights, strict=True)]
    )
    roots = strengths.abs().sqrt()
    signed = torch.where(strengths < 0, -roots, roots)
    down = torch.stack([torch.zeros_like(first.a) if pair is None else pair.a for pair in pairs])
    up = torch.stack([torch.zeros_like(first.b) if pair is None else pair.b for pair in pairs])
    a, b = combine(down, signed, terms.generator), combine(up, roots, terms.generator)
    return LowRank(a.mT, b.mT, e=_merge_shifts(combine, terms))


def merge_knots(combine: Combine, terms: SiteTerms) -> Change:
    """Combine the changes in the left singular basis of all changes concatenated by columns."""
    q, r = torch.linalg.qr(torch.cat([b for b, _ in terms.pairs], dim=-1))
    rows = [torch.linalg.qr(a.mT) for _, a in terms.pairs]
    blocks = r.split([a.shape[-2] for _, a in terms.pairs], dim=-1)
    inner = [block @ upper.mT for block, (_, upper) in zip(blocks, rows, strict=True)]
    u, s, v = torch.linalg.svd(torch.cat(inner, dim=-1), full_matrices=False)
    right = v.split([part.shape[-1] for part in inner], dim=-1)
    parts = [s.unsqueeze(-1) * (part @ basis.mT) for part, (basis, _) in zip(right, rows, strict=True)]
    merged = combine(torch.stack(parts), u.new_tensor(terms.weights), terms.generator)
    return LowRank(merged.mT, (q @ u).mT, e=_merge_shifts(combine, terms))


def merge_core(combine: Combine, terms: SiteTerms) -> Change:
    """Combine the cores Uᵀ·Bᵢ·Aᵢ·V of the changes, where U and V are bases of all B and all A."""
    u = torch.linalg.svd(torch.cat([b for b, _ in terms.pairs], dim=-1), full_matrices=False)[0]
    v = torch.linalg.svd(torch.cat([a for _, a in terms.pairs], dim=-2), full_matrices=False)[2]
    cores = torch.stack([(u.mT @ b) @ (a @ v.mT) for b, a in terms.pairs])
    core = combine(cores, u.new_tensor(terms.weights), terms.generator)
    return LowRank(v.mT, (u @ core).mT, e=_merge_shifts(combine, terms))


SPACES: Mapping[str, Callable[[Combine, SiteTerms], Change]] = {
    "deltas": merge_deltas,
    "factors": merge_factors,
    "knots": merge_knots,
    "core": merge_core,
}
"""The spaces by name."""


def sum_changes(coefficients: Sequence[float], terms: SiteTerms) -> Change:
    """Return Σ cᵢ·Δᵢ in the cheapest form that is exact."""
    present = [(c, change) for c, change in zip(coefficients, terms.changes, strict=True) if change is not None]
    forms = {type(change) for _, change in present}
    low_rank = [change for _, change in present if isinstance(change, LowRank)]
    mixed = len(forms) > 1 or Dense in forms or not (not low_rank or are_summable(low_rank))
    if not mixed:
        total = compose(present, refuse_weight)
        assert total is not None
        return total
    shift = None if terms.shifts is None else weighted_sum(terms.shifts, coefficients)
    return Delta(weighted_sum(terms.deltas, coefficients), shift)


def _merge_shifts(combine: Combine, terms: SiteTerms) -> Tensor | None:
    if terms.shifts is None:
        return None
    return combine(terms.shifts, terms.shifts.new_tensor(terms.weights), terms.generator)


def weighted_sum(tensors: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Return Σ cᵢ·Tᵢ of stacked tensors (N, …)."""
    return torch.tensordot(tensors.new_tensor(coefficients), tensors, dims=1)
