"""Terms as people read them: one adapter at one site, in its normal form."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change, Dense, LowRank, Sparse, SparseSum
from lorac.ir.sites import Site
from lorac.ir.slots.choice import choice_strengths
from lorac.ir.slots.composition import ComposedSite, ComposedWeights, place_change
from lorac.ir.slots.plans import BranchSlot, BranchTerm, PreparedAdapter, Reason, SitePlan
from lorac.ir.slots.roles import ROLES, tensors_by_role

LIVE, BOUND, FUSED, BAKED, LEFT_OUT, UNUSED = "live", "bound", "fused", "baked", "left out", "unused"
STATES = {
    LIVE: "next to the weight",
    BOUND: "merged weight, bound as an input",
    FUSED: "merged weight, written in place",
    BAKED: "merged weight, a constant of the program",
    LEFT_OUT: "baked without it",
    UNUSED: "no output of the program depends on the site",
}
"""How the active choice runs a term. For a term that is off: how a swap to its adapter alone would run it."""


class DescribedMethod(Protocol):
    """A method with its hyper-parameters."""

    @property
    def name(self) -> str: ...
    @property
    def own_settings(self) -> Mapping[str, object]: ...


@dataclass(frozen=True)
class TermTensor:
    """One tensor of a term: its name and shape (as adapters store it: A (r, in), B (out, r)), dtype and size."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True)
class TermDescription:
    """One adapter at one site.

    Attributes:
        adapter: its name.
        site: path of the site.
        form: ``"low-rank"``, ``"sparse"``, ``"dense"`` or ``"branch"``.
        size: ``r=8`` or ``k=400 (1 %)``; empty where the shapes are enough.
        parts: its tensors.
        state: how the active choice runs it, one of ``STATES``.
        strength: its strength in the active choice, 0 where it is off.
        slots: names of the slots that it fills: roles, or parameters of a branch.
        reasons: why it has no cheaper form, then why it has no cheaper place.
        unfusable: why it cannot be merged into the weight, or None.
        flops: its multiplications and additions per token while it is active.
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
    prepared: Mapping[str, PreparedAdapter], plans: Mapping[str, SitePlan], *, mode: str, snapshot: ComposedWeights
) -> dict[str, tuple[TermDescription, ...]]:
    """Return the terms of each site that has some, sorted by adapter.

    Args:
        prepared: adapters in their normal forms.
        plans: the slots of the sites.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        snapshot: the active choice, and the slots that it fills.
    """
    found: dict[str, list[TermDescription]] = {path: [] for path in plans}
    strengths = choice_strengths(snapshot.choice)
    for name in sorted(prepared):
        adapter, strength = prepared[name], strengths.get(name, 0.0)
        forms: dict[str, tuple[Reason, ...]] = {}
        for reason in adapter.reasons:
            forms[reason.site] = (*forms.get(reason.site, ()), reason)
        changes = {path: change for path, change in adapter.changes.items() if path in plans}
        for path, change in changes.items():
            here = snapshot.composed[path] if strength else place_change(plans[path], change, (name,))
            term = _describe_change_term(name, plans[path].site, change, here, mode, strength)
            found[path].append(replace(term, reasons=(*forms.get(path, ()), *here.reasons)))
        branches = {path: branch for path, branch in adapter.branches.items() if path in plans}
        for path, branch in branches.items():
            found[path].append(_describe_branch_term(name, path, branch, strength, forms.get(path, ())))
    return {path: tuple(terms) for path, terms in found.items() if terms}


def describe_variant(variant: DescribedMethod) -> str:
    """Return a method and its own hyper-parameters in one line: ``dora r=8 alpha=16``."""
    parts = [variant.name]
    for name, value in variant.own_settings.items():
        if value and isinstance(value, int | float | str):
            parts.append(name if value is True else f"{name}={value if isinstance(value, str) else f'{value:g}'}")
    return " ".join(parts)


def format_reason(reason: Reason, names: Collection[str]) -> str:
    """Return a reason for a line about some adapters, which need not be named again."""
    if reason.adapter is None or reason.adapter in names:
        return reason.why
    return f"active together with it, {reason}"


def format_size(nbytes: float) -> str:
    """Return a number of bytes in a suitable unit."""
    for unit in ("B", "kB", "MB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} GB"


def _describe_change_term(
    name: str, site: Site, change: Change, here: ComposedSite, mode: str, strength: float
) -> TermDescription:
    form, size, parts = _describe_change(change, site)
    state = _term_state(here, mode, strength)
    flops = _count_low_rank_flops(change, site) if state == LIVE and isinstance(change, LowRank) else 0
    slots = () if mode == BAKED else _filled_roles(change, here)
    return TermDescription(
        name, site.path, form, size, parts, state, strength, slots, (), _unfusable_reason(site, change), flops
    )


def _term_state(here: ComposedSite, mode: str, strength: float) -> str:
    if mode == BAKED:
        return BAKED if strength else LEFT_OUT
    if mode == FUSED:
        return FUSED
    return BOUND if operands.WEIGHT in here.roles else LIVE


def _filled_roles(change: Change, here: ComposedSite) -> tuple[str, ...]:
    """Return the filled slots to which a change contributes."""
    roles = {operands.WEIGHT}
    if isinstance(change, LowRank) and operands.WEIGHT not in here.roles:
        roles = set(tensors_by_role(change))
    roles |= {operands.BIAS} if change.e is not None else set()
    return tuple(role for role in here.roles if role in roles)


def _describe_branch_term(
    name: str, path: str, branch: BranchTerm, strength: float, reasons: tuple[Reason, ...]
) -> TermDescription:
    parts = tuple(_describe_tensor(n, t) for n, t in zip(branch.slot.params, branch.params, strict=True))
    slots, flops, unfusable = tuple(branch.slot.params), count_branch_flops(branch.slot), "y' is not affine in x"
    return TermDescription(name, path, "branch", "", parts, LIVE, strength, slots, reasons, unfusable, flops)


def _describe_change(change: Change, site: Site) -> tuple[str, str, tuple[TermTensor, ...]]:
    shift = [] if change.e is None else [(ROLES[operands.BIAS].letter, change.e)]
    if isinstance(change, LowRank):
        found = [(ROLES[name].letter, ROLES[name].seen(part)) for name, part in tensors_by_role(change).items()]
        return "low-rank", f"r={change.rank}", _describe_tensors([*found, *shift])
    if isinstance(change, Dense):
        return "dense", "", _describe_tensors([(f"{ROLES[operands.WEIGHT].letter}'", change.weight), *shift])
    terms = (change,) if isinstance(change, Sparse) else tuple(term for _, term in change.terms)
    count = sum(term.values.numel() for term in terms)
    share = count / max(1, site.out_features * site.in_features)
    rows = [(n, torch.cat([getattr(term, n) for term in terms])) for n in ("rows", "cols", "values")]
    return "sparse", f"k={count} ({share:.2%})", _describe_tensors([*rows, *shift])


def _describe_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[TermTensor, ...]:
    return tuple(_describe_tensor(name, tensor) for name, tensor in tensors)


def _describe_tensor(name: str, tensor: torch.Tensor) -> TermTensor:
    return TermTensor(name, tuple(tensor.shape), tensor.dtype, tensor.nbytes)


def _unfusable_reason(site: Site, change: Change) -> str | None:
    if site.conv is None or site.conv.groups == 1 or isinstance(change, Sparse | SparseSum):
        return None
    return "it may leave the blocks of a grouped convolution"


def _count_low_rank_flops(change: LowRank, site: Site) -> int:
    parts = tensors_by_role(change) | ({} if change.e is None else {operands.BIAS: change.e})
    return sum(ROLES[name].flops(site, part) for name, part in parts.items())


def count_branch_flops(slot: BranchSlot) -> int:
    """Return the multiplications and additions per token of a branch that applies each matrix once."""
    return sum(2 * math.prod(shape) if len(shape) > 1 else math.prod(shape) for shape in slot.params.values())
