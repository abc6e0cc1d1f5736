"""Which slots every site gets, from the normal forms of the adapters, the mode, and what was reserved.

``auto`` and ``live``: low-rank and branch terms beside the weight, sparse and dense terms through a bound weight.
``fused`` and ``baked``: every weight-form term through the weight (which a backend then makes an input or a constant).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lorac.errors import NotMergeable, UnknownOption, nearest_name
from lorac.ir.algebra.changes import Change, Dense, LowRank
from lorac.ir.host.patterns import nothing_matches, select
from lorac.ir.host.sites import Site, SiteKind
from lorac.ir.slots.filling import leaves_blocks
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.site import BranchSlot, Prepared, SitePlan

MODES = ("auto", "live", "fused", "baked")


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """Room for adapters added later.

    Attributes:
        targets: which sites, as an adapter's ``targets``.
        rank: largest rank of one adapter.
        adapters: how many may be active together.
        scales: DoRA-like adapters (an output scale and a shift) fit too.
        weights: any weight-form adapter fits, through a bound weight.
    """

    targets: str | tuple[str, ...] = "all-linear"
    rank: int = 16
    adapters: int = 1
    scales: bool = False
    weights: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))


@dataclass
class _Needs:
    """What the terms met at one site ask for."""

    rank: int = 0
    c: bool = False
    d: bool = False
    t: set[int] = field(default_factory=set)
    gates: bool = False
    bound: bool = False
    bias: bool = False
    branches: list[BranchSlot] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


def plan_sites(
    sites: Mapping[str, Site], prepared: Mapping[str, Prepared], mode: str, reserve: Reserve | None = None
) -> dict[str, SitePlan]:
    """One plan per touched or reserved site, in the order of ``sites``.

    Raises:
        UnknownOption: no such mode.
        NotMergeable: a branch, a weight that leaves a grouped convolution's blocks, or anything at a quantised weight
            is to be fused or baked.
        SiteNotFound: ``reserve`` names no site.
    """
    if mode not in MODES:
        raise UnknownOption(f"there is no mode '{mode}'", nearest=nearest_name(mode, MODES) or ", ".join(MODES))
    needs: dict[str, _Needs] = {}
    for name in sorted(prepared):
        for path, change in prepared[name].changes.items():
            need = needs.setdefault(path, _Needs())
            _need_change(need, name, sites[path], change, mode)
            bound = mode in {"fused", "baked"} or not _beside(sites[path], change)
            if bound and leaves_blocks(sites[path], change):
                raise NotMergeable(
                    f"'{name}' leaves the blocks of '{path}', a grouped convolution whose kernel cannot hold that",
                    next_step="mode='live' (or 'auto') runs a low-rank adapter beside it",
                )
        for path, term in prepared[name].branches.items():
            if mode in {"fused", "baked"}:
                raise NotMergeable(
                    f"adapter '{name}' at '{path}' is a branch with no weight form, so it cannot be {mode}",
                    next_step="mode='live' (or 'auto') keeps it in the graph",
                )
            needs.setdefault(path, _Needs()).branches.append(term.slot)
    if reserve is not None:
        _reserve(needs, sites, reserve, mode)
    packed = [site for path, site in sites.items() if path in needs and site.packed]
    if packed and mode in {"fused", "baked"}:
        raise NotMergeable(
            f"'{packed[0].path}' holds its weight as {packed[0].packed}, into which nothing can be merged",
            next_step="mode='live' (or 'auto') runs adapters beside it; or dequantise the base",
        )
    return {path: _plan(sites[path], needs[path]) for path in sites if path in needs}


def _beside(site: Site, change: Change) -> bool:
    """Whether a change runs beside the weight in live mode; changed inputs do where they have an axis for it."""
    return isinstance(change, LowRank) and (layout_of(site).has_input_axis or not change.changes_input)


def _need_change(need: _Needs, name: str, site: Site, change: Change, mode: str) -> None:
    if mode in {"fused", "baked"}:
        need.bound = True
        need.bias |= change.e is not None
    elif isinstance(change, LowRank) and _beside(site, change):
        need.rank += change.rank
        need.c |= change.c is not None
        need.d |= change.d is not None
        need.t |= set() if change.t is None else {change.t.shape[-1]}
        need.gates |= change.g is not None or change.h is not None
        need.bias |= change.e is not None
    else:
        need.bound = True
        need.bias |= change.e is not None
        what = (
            "dense" if isinstance(change, Dense) else "changes its input" if isinstance(change, LowRank) else "sparse"
        )
        need.reasons.append(f"bound weight: '{name}' is {what}")


def _reserve(needs: dict[str, _Needs], sites: Mapping[str, Site], reserve: Reserve, mode: str) -> None:
    chosen = [s for s in select(sites, reserve.targets) if s.kind not in {SiteKind.BLOCK, SiteKind.PARAMETER}]
    if not chosen:
        raise nothing_matches("reserve", reserve.targets, sites)
    for site in chosen:
        need = needs.setdefault(site.path, _Needs())
        need.bound |= mode == "fused" or reserve.weights
        if mode != "fused":
            need.rank += reserve.rank * reserve.adapters
            need.c |= reserve.scales
        need.bias |= reserve.scales


def _plan(site: Site, need: _Needs) -> SitePlan:
    if need.c and (need.d or need.t):
        need.bound = True
        need.reasons.append("bound weight: outputs and inputs are changed, and the sum of both is neither")
    if len(need.t) > 1:
        need.bound = True
        need.reasons.append(f"bound weight: input transforms in blocks of {' and '.join(map(str, sorted(need.t)))}")
    return SitePlan(
        site,
        rank=need.rank,
        c=need.c,
        d=need.d,
        t=max(need.t, default=0),
        g=need.gates,
        h=need.gates,
        bound=need.bound,
        bias=need.bias,
        branches=tuple(need.branches),
        reasons=tuple(need.reasons),
    )
