"""Terms as a person reads them: what one adapter comes to at one site, in its normal form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lorac.ir.algebra import letters
from lorac.ir.algebra.changes import Change, Dense, LowRank, Sparse, SparseSum
from lorac.ir.host.sites import Site
from lorac.ir.slots.filling import beside
from lorac.ir.slots.roles import ROLES, parts_of
from lorac.ir.slots.site import BranchSlot, BranchTerm, Prepared, SitePlan

LIVE, BOUND, FUSED, BAKED = "live", "bound", "fused", "baked"


@dataclass(frozen=True)
class Part:
    """One tensor of a term: its name and shape (as adapters store it: A (r, in), B (out, r)), dtype and size."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class Term:
    """One adapter at one site.

    Attributes:
        adapter: its name.
        site: path of the site.
        form: ``"low-rank"``, ``"sparse"``, ``"dense"`` or ``"branch"``.
        size: ``r=8`` or ``k=400 (1 %)``; empty where shapes say it all.
        parts: its tensors.
        state: ``live`` (beside the weight), ``bound`` (merged weight, bound as an input), ``fused`` (merged weight,
            written in place) or ``baked`` (merged, constant).
        strength: its strength in the active choice, 0 where it is off.
        unfusable: why it cannot be merged into the weight, or None.
        flops: multiplications and additions per token that it costs while active.
    """

    adapter: str
    site: str
    form: str
    size: str
    parts: tuple[Part, ...]
    state: str
    strength: float
    unfusable: str | None
    flops: int

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.parts)


def describe_terms(
    prepared: Mapping[str, Prepared],
    plans: Mapping[str, SitePlan],
    *,
    mode: str,
    strengths: Mapping[str, float],
) -> dict[str, tuple[Term, ...]]:
    """Site path -> its terms, by adapter name.

    Args:
        prepared: adapters in their normal forms.
        plans: the sites' slots.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        strengths: the active choice.
    """
    found: dict[str, list[Term]] = {path: [] for path in plans}
    for name in sorted(prepared):
        adapter, strength = prepared[name], strengths.get(name, 0.0)
        changes = {path: change for path, change in adapter.changes.items() if path in plans}
        terms = [_change_term(name, plans[path], change, mode, strength) for path, change in changes.items()]
        branches = {path: branch for path, branch in adapter.branches.items() if path in plans}
        terms += [_branch_term(name, path, branch, strength) for path, branch in branches.items()]
        for term in terms:
            found[term.site].append(term)
    return {path: tuple(terms) for path, terms in found.items() if terms}


def describe_variant(variant: Any) -> str:
    """A method and its own hyper-parameters, in one line: ``dora r=8 alpha=16``."""
    common = {name for base in type(variant).__mro__[1:] for name in getattr(base, "__annotations__", ())}
    parts = [str(variant.name)]
    for field in dataclasses.fields(variant):
        value = getattr(variant, field.name)
        if field.name in common or not value or not isinstance(value, int | float | str):
            continue
        parts.append(
            field.name if value is True else f"{field.name}={value if isinstance(value, str) else f'{value:g}'}"
        )
    return " ".join(parts)


def _change_term(name: str, plan: SitePlan, change: Change, mode: str, strength: float) -> Term:
    site = plan.site
    form, size, parts = _describe(change, site)
    live = mode == LIVE and beside(plan, change) is not None
    state = LIVE if live else {"live": BOUND, "fused": FUSED, "baked": BAKED}[mode]
    flops = _low_rank_flops(change, site) if live and isinstance(change, LowRank) else 0
    return Term(name, site.path, form, size, parts, state, strength, _unfusable(site, change), flops)


def _branch_term(name: str, path: str, branch: BranchTerm, strength: float) -> Term:
    parts = tuple(_part(n, t) for n, t in zip(branch.slot.params, branch.params, strict=True))
    return Term(name, path, "branch", "", parts, LIVE, strength, "y' is not affine in x", branch_flops(branch.slot))


def _describe(change: Change, site: Site) -> tuple[str, str, tuple[Part, ...]]:
    shift = [] if change.e is None else [(ROLES[letters.BIAS].letter, change.e)]
    if isinstance(change, LowRank):
        found = [(ROLES[name].letter, ROLES[name].seen(part)) for name, part in parts_of(change).items()]
        return "low-rank", f"r={change.rank}", _parts([*found, *shift])
    if isinstance(change, Dense):
        return "dense", "", _parts([(f"{ROLES[letters.WEIGHT].letter}'", change.weight), *shift])
    terms = (change,) if isinstance(change, Sparse) else tuple(term for _, term in change.terms)
    count = sum(term.values.numel() for term in terms)
    share = count / max(1, site.out_features * site.in_features)
    rows = [(n, torch.cat([getattr(term, n) for term in terms])) for n in ("rows", "cols", "values")]
    return "sparse", f"k={count} ({share:.2%})", _parts([*rows, *shift])


def _parts(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[Part, ...]:
    return tuple(_part(name, tensor) for name, tensor in tensors)


def _part(name: str, tensor: torch.Tensor) -> Part:
    return Part(name, tuple(tensor.shape), tensor.dtype, tensor.nbytes)


def _unfusable(site: Site, change: Change) -> str | None:
    if site.conv is None or site.conv.groups == 1 or isinstance(change, Sparse | SparseSum):
        return None
    return "it may leave the blocks of a grouped convolution"


def _low_rank_flops(change: LowRank, site: Site) -> int:
    parts = parts_of(change) | ({} if change.e is None else {letters.BIAS: change.e})
    return sum(ROLES[name].flops(site, part) for name, part in parts.items())


def branch_flops(slot: BranchSlot) -> int:
    """Multiplications and additions per token of a branch whose matrices are each applied once."""
    return sum(2 * math.prod(shape) if len(shape) > 1 else math.prod(shape) for shape in slot.params.values())
