"""Terms as people read them: one adapter at one site, in its normal form."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change, Delta, Dense, LowRank, Sparse, SparseSum
from lorac.ir.algebra.reduction import BRANCH
from lorac.ir.sites.site import Site
from lorac.ir.slots.choice import choice_strengths
from lorac.ir.slots.composition import ComposedSite, ComposedWeights, place_change
from lorac.ir.slots.plans import PreparedAdapter, Reason, SitePlan
from lorac.ir.slots.roles import ROLES, tensors_by_role
from lorac.report.dump import short_dtype

LIVE, BOUND, FUSED, BAKED, LEFT_OUT, UNUSED = "live", "bound", "fused", "baked", "left out", "unused"
STATES = {
    LIVE: "next to the weight",
    BOUND: "merged weight, bound as an input",
    FUSED: "merged weight, written in place",
    BAKED: "merged weight, a constant of the program",
    LEFT_OUT: "baked without it",
    UNUSED: "no output of the program depends on the site",
}
"""The ways in which the active choice runs a term, or in which a swap to its adapter alone would run it."""

_REBINDING = "rebinding, no copy"


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
class TermRow:
    """One adapter at one site.

    Attributes:
        site: path of the site.
        shape: (in, out).
        form: its normal form, with rank or count: ``"low-rank r=8"``, ``"sparse k=400 (1 %)"``.
        state: how the active choice runs it, or would run it where it is off (``STATES``).
        strength: in the active choice; 0: off.
        slots: the slots of the site that it fills: roles, or parameters of a branch.
        dtype: dtype of its computation.
        nbytes: size of its tensors.
        swap: the cost of switching to it.
        reasons: why it has no cheaper form, then why it has no cheaper place.
        unfusable: why it cannot be merged into the weight, or None.
        flops: its multiplications and additions per token while it is active.
    """

    site: str
    kind: str
    shape: tuple[int, int]
    adapter: str
    form: str
    parts: tuple[TermTensor, ...]
    state: str
    strength: float
    slots: tuple[str, ...]
    dtype: str
    nbytes: int
    swap: str
    reasons: tuple[Reason, ...]
    unfusable: str | None
    flops: int


def describe_terms(
    prepared: Mapping[str, PreparedAdapter], plans: Mapping[str, SitePlan], *, mode: str, snapshot: ComposedWeights
) -> dict[str, tuple[TermRow, ...]]:
    """Return the terms of each site that has some, sorted by adapter.

    Args:
        prepared: adapters in their normal forms.
        plans: the slots of the sites.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        snapshot: the active choice, and the slots that it fills.
    """
    found: dict[str, list[TermRow]] = {path: [] for path in plans}
    strengths = choice_strengths(snapshot.choice)
    for name in sorted(prepared):
        adapter, strength = prepared[name], strengths.get(name, 0.0)
        reasons: dict[str, list[Reason]] = {}
        for reason in adapter.reasons:
            reasons.setdefault(reason.site, []).append(reason)
        changes = {path: change for path, change in adapter.changes.items() if path in plans}
        for path, change in changes.items():
            filled = snapshot.composed[path] if strength else place_change(plans[path], change, (name,))
            why = [*reasons.get(path, ()), *filled.reasons]
            found[path].append(_describe_change_term(name, plans[path].site, change, filled, mode, strength, why))
        branches = {path: branch for path, branch in adapter.branches.items() if path in plans}
        for path, branch in branches.items():
            why = reasons.get(path, [])
            unfusable = "y' is not affine in x"
            found[path].append(
                _make_row(
                    plans[path].site,
                    adapter=name,
                    form=BRANCH,
                    parts=_describe_tensors(zip(branch.slot.params, branch.params, strict=True)),
                    state=LIVE,
                    strength=strength,
                    slots=tuple(branch.slot.params),
                    swap=_REBINDING,
                    reasons=tuple(dict.fromkeys(why)) or (Reason(name, path, unfusable),),
                    unfusable=unfusable,
                    # each matrix is applied once
                    flops=sum(math.prod(shape) * min(len(shape), 2) for shape in branch.slot.params.values()),
                )
            )
    return {path: tuple(terms) for path, terms in found.items() if terms}


def describe_variant(variant: DescribedMethod) -> str:
    """Return a method and its own hyper-parameters in one line: ``dora r=8 alpha=16``."""
    parts = [variant.name]
    for name, value in variant.own_settings.items():
        if value and isinstance(value, int | float | str):
            parts.append(name if value is True else f"{name}={value if isinstance(value, str) else f'{value:g}'}")
    return " ".join(parts)


def format_reason(reason: Reason, names: Collection[str]) -> str:
    """Return a reason for a line that has named its adapters already."""
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
    name: str, site: Site, change: Change, filled: ComposedSite, mode: str, strength: float, reasons: list[Reason]
) -> TermRow:
    form, parts = _describe_change(change, site)
    state, is_low_rank = BOUND if operands.WEIGHT in filled.roles else LIVE, isinstance(change, LowRank)
    if mode == BAKED:
        state = BAKED if strength else LEFT_OUT
    elif mode == FUSED:
        state = FUSED
    is_cheapest = state in (BAKED, LEFT_OUT) or (is_low_rank and state == LIVE)
    grouped = site.conv is not None and site.conv.groups > 1 and not isinstance(change, Sparse | SparseSum)
    flops = 0
    if isinstance(change, LowRank) and state == LIVE:
        tensors = tensors_by_role(change) | ({} if change.e is None else {operands.BIAS: change.e})
        flops = sum(ROLES[name].flops(site, tensor) for name, tensor in tensors.items())
    roles = {operands.WEIGHT}
    if isinstance(change, LowRank) and operands.WEIGHT not in filled.roles:
        roles = set(tensors_by_role(change))
    roles |= {operands.BIAS} if change.e is not None else set()
    return _make_row(
        site,
        adapter=name,
        form=form,
        parts=parts,
        state=state,
        strength=strength,
        slots=() if mode == BAKED else tuple(role for role in filled.roles if role in roles),
        swap=_swap_cost(site, change, state),
        reasons=() if is_cheapest else tuple(dict.fromkeys(reasons)),
        unfusable="it may leave the blocks of a grouped convolution" if grouped else None,
        flops=flops,
    )


def _make_row(site: Site, *, parts: tuple[TermTensor, ...], state: str, **fields: Any) -> TermRow:
    """Return a row of a site; the other fields are given."""
    floating = [part.dtype for part in parts if part.dtype.is_floating_point]
    dtype = short_dtype(floating[0] if floating and state == LIVE else site.dtype)
    nbytes, shape = sum(part.nbytes for part in parts), (site.in_features, site.out_features)
    own: dict[str, Any] = {"site": site.path, "kind": str(site.kind), "shape": shape, "dtype": dtype, "nbytes": nbytes}
    return TermRow(parts=parts, state=state, **own, **fields)


def _swap_cost(site: Site, change: Change, state: str) -> str:
    """Return the cost of switching to the adapter alone at a site, by its form (docs/architecture.md, invariant 7)."""
    weight = format_size(math.prod(site.kernel) * site.dtype.itemsize)
    if state in (BAKED, LEFT_OUT):
        return "none: constants of the program"
    if state == BOUND:
        return f"once {weight} for its merged weight, then rebinding"
    if state == FUSED and isinstance(change, Sparse | SparseSum):
        return f"restore and write of {format_size(sum(term.values.nbytes for term in _sparse_terms(change)))}"
    return f"one pass over {weight}" if state == FUSED else _REBINDING


def _describe_change(change: Change, site: Site) -> tuple[str, tuple[TermTensor, ...]]:
    """Return the form of a change, with rank or count, and its tensors."""
    shift = [] if change.e is None else [(ROLES[operands.BIAS].letter, change.e)]
    if isinstance(change, LowRank):
        found = [(ROLES[name].letter, ROLES[name].seen(part)) for name, part in tensors_by_role(change).items()]
        return f"low-rank r={change.rank}", _describe_tensors([*found, *shift])
    if isinstance(change, Dense):
        return "dense", _describe_tensors([(f"{ROLES[operands.WEIGHT].letter}'", change.weight), *shift])
    if isinstance(change, Delta):
        return "dense", _describe_tensors([("D", change.delta), *shift])
    terms = _sparse_terms(change)
    count = sum(term.values.numel() for term in terms)
    share = count / max(1, site.out_features * site.in_features)
    rows = [(n, torch.cat([getattr(term, n) for term in terms])) for n in ("rows", "cols", "values")]
    return f"sparse k={count} ({share:.2%})", _describe_tensors([*rows, *shift])


def _sparse_terms(change: Sparse | SparseSum) -> tuple[Sparse, ...]:
    return (change,) if isinstance(change, Sparse) else tuple(term for _, term in change.terms)


def _describe_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> tuple[TermTensor, ...]:
    return tuple(TermTensor(name, tuple(tensor.shape), tensor.dtype, tensor.nbytes) for name, tensor in tensors)
