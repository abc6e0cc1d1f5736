"""Terms as a person reads them: what one adapter comes to at one site, in its normal form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorac.ir.algebra import letters
from lorac.ir.algebra.changes import Change, Dense, LowRank, Sparse, SparseSum
from lorac.ir.host.sites import Site
from lorac.ir.slots.choice import spell
from lorac.ir.slots.roles import ROLES, parts_of
from lorac.ir.slots.site import BranchSlot, BranchTerm, Prepared, Reason, SitePlan
from lorac.ir.slots.snapshot import Composed, Snapshot, placed

LIVE, BOUND, FUSED, BAKED, LEFT_OUT = "live", "bound", "fused", "baked", "left out"


@dataclass(frozen=True)
class TermTensor:
    """One tensor of a term: its name and shape (as adapters store it: A (r, in), B (out, r)), dtype and size."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class DescribedTerm:
    """One adapter at one site.

    Attributes:
        adapter: its name.
        site: path of the site.
        form: ``"low-rank"``, ``"sparse"``, ``"dense"`` or ``"branch"``.
        size: ``r=8`` or ``k=400 (1 %)``; empty where shapes say it all.
        parts: its tensors.
        state: what the active choice did with it: ``live`` (beside the weight), ``bound`` (merged weight, bound as an
            input), ``fused`` (merged weight, written in place), ``baked`` (merged, constant). Of a term that is off,
            what a swap to its adapter alone would do; ``left out`` where the program is baked without it.
        strength: its strength in the active choice, 0 where it is off.
        slots: names of the slots it fills: roles, or a branch's parameters.
        reasons: why it has no cheaper form, then why no cheaper place.
        unfusable: why it cannot be merged into the weight, or None.
        flops: multiplications and additions per token that it costs while active.
    """

    adapter: str
    site: str
    form: str
    size: str
    parts: tuple[TermTensor, ...]
    state: str
    strength: float
    slots: tuple[str, ...]
    reasons: tuple[Reason, ...]
    unfusable: str | None
    flops: int

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for part in self.parts)


def describe_terms(
    prepared: Mapping[str, Prepared], plans: Mapping[str, SitePlan], *, mode: str, snapshot: Snapshot
) -> dict[str, tuple[DescribedTerm, ...]]:
    """Site path -> its terms, by adapter name.

    Args:
        prepared: adapters in their normal forms.
        plans: the sites' slots.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        snapshot: the active choice, and what it fills.
    """
    found: dict[str, list[DescribedTerm]] = {path: [] for path in plans}
    strengths = spell(snapshot.choice)
    for name in sorted(prepared):
        adapter, strength = prepared[name], strengths.get(name, 0.0)
        forms: dict[str, tuple[Reason, ...]] = {}
        for reason in adapter.reasons:
            forms[reason.site] = (*forms.get(reason.site, ()), reason)
        changes = {path: change for path, change in adapter.changes.items() if path in plans}
        for path, change in changes.items():
            here = snapshot.composed[path] if strength else placed(plans[path], change, (name,))
            term = _change_term(name, plans[path].site, change, here, mode, strength)
            found[path].append(replace(term, reasons=(*forms.get(path, ()), *here.reasons)))
        branches = {path: branch for path, branch in adapter.branches.items() if path in plans}
        for path, branch in branches.items():
            found[path].append(_branch_term(name, path, branch, strength, forms.get(path, ())))
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


def told_size(nbytes: float) -> str:
    """Bytes in a unit that suits them."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"


def _change_term(name: str, site: Site, change: Change, here: Composed, mode: str, strength: float) -> DescribedTerm:
    form, size, parts = _describe(change, site)
    state = _state(here, mode, strength)
    flops = _low_rank_flops(change, site) if state == LIVE and isinstance(change, LowRank) else 0
    slots = () if mode == BAKED else _filled(change, here)
    return DescribedTerm(
        name, site.path, form, size, parts, state, strength, slots, (), _unfusable(site, change), flops
    )


def _state(here: Composed, mode: str, strength: float) -> str:
    if mode == BAKED:
        return BAKED if strength else LEFT_OUT
    if mode == FUSED:
        return FUSED
    return BOUND if letters.WEIGHT in here.into else LIVE


def _filled(change: Change, here: Composed) -> tuple[str, ...]:
    """Those of the slots that a sum fills to which one of its values brings something."""
    own = {letters.WEIGHT}
    if isinstance(change, LowRank) and letters.WEIGHT not in here.into:
        own = set(parts_of(change))
    own |= {letters.BIAS} if change.e is not None else set()
    return tuple(role for role in here.into if role in own)


def _branch_term(
    name: str, path: str, branch: BranchTerm, strength: float, reasons: tuple[Reason, ...]
) -> DescribedTerm:
    parts = tuple(_part(n, t) for n, t in zip(branch.slot.params, branch.params, strict=True))
    slots, flops, unfusable = tuple(branch.slot.params), branch_flops(branch.slot), "y' is not affine in x"
    return DescribedTerm(name, path, "branch", "", parts, LIVE, strength, slots, reasons, unfusable, flops)


def _describe(change: Change, site: Site) -> tuple[str, str, tuple[TermTensor, ...]]:
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


def _parts(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[TermTensor, ...]:
    return tuple(_part(name, tensor) for name, tensor in tensors)


def _part(name: str, tensor: torch.Tensor) -> TermTensor:
    return TermTensor(name, tuple(tensor.shape), tensor.dtype, tensor.nbytes)


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
