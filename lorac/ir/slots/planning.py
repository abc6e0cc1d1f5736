"""Which slots every site gets, from the normal forms of the adapters, the mode, and what was reserved.

``auto`` and ``live``: low-rank and branch terms beside the weight, sparse and dense terms through a bound weight.
``fused`` and ``baked``: every weight-form term through the weight (which a backend then makes an input or a constant).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from lorac.argument_types import check_fields
from lorac.errors import CompileError, SiteError, not_one_of
from lorac.ir.algebra import operands as letters
from lorac.ir.algebra.changes import Change, LowRank
from lorac.ir.algebra.operands import FOLDABLE
from lorac.ir.patterns import check_targets_match, no_match_error, select_sites
from lorac.ir.sites import KINDS_WITHOUT_WEIGHT, Site
from lorac.ir.slots.filling import leaves_blocks, why_merged_weight
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.plans import BranchSlot, BranchTerm, PreparedAdapter, RankPolicy, Reason, SitePlan
from lorac.ir.slots.role import Stage
from lorac.ir.slots.roles import ROLES, keeps_base_weight, tensors_by_role

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
        check_fields(self)


@dataclass
class _SiteNeeds:
    """What the terms met at one site ask for.

    Attributes:
        rooms: role -> every size of room that a term asks for.
        rank: of all terms together.
    """

    rooms: dict[str, set[int]] = field(default_factory=dict)
    rank: int = 0
    branches: list[BranchSlot] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)

    def want(self, role: str, size: int = 1) -> None:
        """Ask for a role."""
        self.rooms.setdefault(role, set()).add(size)


def plan_sites(
    sites: Mapping[str, Site],
    prepared: Mapping[str, PreparedAdapter],
    mode: str,
    reserve: Reserve | None = None,
    ranks: Callable[[Site], RankPolicy] = lambda _: RankPolicy.FROM_ZERO,
) -> dict[str, SitePlan]:
    """One plan per touched or reserved site, in the order of ``sites``.

    Args:
        sites: every site of the host.
        prepared: the adapters.
        mode: one of ``MODES``.
        reserve: room for others.
        ranks: which ranks the pair of a site may have on the target.

    Raises:
        OptionError: no such mode.
        CompileError: a branch, a weight that leaves a grouped convolution's blocks, or anything at a quantised weight
            is to be fused or baked.
        SiteError: ``reserve`` names no site.
    """
    if mode not in MODES:
        raise not_one_of("there is no mode", mode, MODES)
    needs: dict[str, _SiteNeeds] = {}
    terms = [(name, path, prepared[name]) for name in sorted(prepared) for path in prepared[name].in_order()]
    for name, path, adapter in terms:
        need = needs.setdefault(path, _SiteNeeds())
        if path in adapter.changes:
            _add_change(need, name, sites[path], adapter.changes[path], mode)
        if path in adapter.branches:
            _add_branch(need, name, path, adapter.branches[path], mode)
    if reserve is not None:
        _add_reserve(needs, sites, reserve, mode)
    planned = {path: _plan_site(site, needs[path], mode) for path, site in sites.items() if path in needs}
    for plan in planned.values():
        if plan.bound and plan.site.packed:
            merging = mode in {"fused", "baked"}
            raise quantized_merge_error(
                plan.site, "" if merging or not plan.reasons else f", and {plan.reasons[0]}", merging
            )
    return {path: replace(plan, ranks=ranks(plan.site)) for path, plan in planned.items()}


def quantized_merge_error(site: Site, why: str, merging: bool = False) -> CompileError:
    """The error for another weight that is to take the place of a quantised one.

    Args:
        site: whose weight is quantised.
        why: what asks for that, where it is not the mode.
        merging: whether the mode merges every adapter.
    """
    beside = "mode='live' (or 'auto') runs low-rank adapters beside it; " if merging else ""
    return CompileError(
        f"'{site.path}' holds its weight as {site.packed}, into which nothing can be merged{why}",
        next_step=f"{beside}a base that is not quantised takes merged weights "
        "(where weights= quantises it: without that, or merged first, with mode='baked')",
        code="not_mergeable",
    )


def needs_merged_weight(site: Site, change: Change) -> bool:
    """Whether a change takes a merged weight even in live mode."""
    return not (isinstance(change, LowRank) and keeps_base_weight(layout_of(site), change))


def _add_branch(need: _SiteNeeds, name: str, path: str, term: BranchTerm, mode: str) -> None:
    if mode in {"fused", "baked"}:
        raise CompileError(
            f"adapter '{name}' at '{path}' is a branch with no weight form, so it cannot be {mode}",
            next_step="; ".join(["mode='live' (or 'auto') keeps it in the graph", *filter(None, [term.slot.instead])]),
            code="not_mergeable",
        )
    need.branches.append(term.slot)


def _add_change(need: _SiteNeeds, name: str, site: Site, change: Change, mode: str) -> None:
    bound = mode in {"fused", "baked"} or needs_merged_weight(site, change)
    if bound and leaves_blocks(site, change):
        raise CompileError(
            f"'{name}' leaves the blocks of '{site.path}', a grouped convolution whose kernel cannot hold that",
            next_step="mode='live' (or 'auto') runs a low-rank adapter beside it",
            code="not_mergeable",
        )
    if change.e is not None:
        _require_bias(name, site)
        need.want(letters.BIAS)
    if mode in {"fused", "baked"}:
        need.want(letters.WEIGHT)
    elif isinstance(change, LowRank) and not needs_merged_weight(site, change):
        need.rank += change.rank
        for role, part in tensors_by_role(change).items():
            need.want(role, ROLES[role].room(part))
    else:
        need.want(letters.WEIGHT)
        need.reasons.append(Reason(name, site.path, _merge_reason(site, change)))


def _merge_reason(site: Site, change: Change) -> str:
    """Why a change is not run beside the weight."""
    if not isinstance(change, LowRank):
        return why_merged_weight(change)
    if site.within is not None:
        return "acts on a weight that its module reads in its own forward, where nothing can run beside it"
    return "changes its input, along which the site has no axis"


def _require_bias(name: str, site: Site) -> None:
    if site.within is not None and site.bias is None:
        raise SiteError(
            f"adapter '{name}' brings a bias to '{site.path}', and '{site.within}', which computes with it, has none",
            next_step="exclude= the module, or train the adapter without a bias",
            code="site_unsupported",
        )


def _add_reserve(needs: dict[str, _SiteNeeds], sites: Mapping[str, Site], reserve: Reserve, mode: str) -> None:
    chosen = [
        s
        for s in select_sites(sites, reserve.targets, parameters=_listed_names(reserve.targets))
        if s.kind not in KINDS_WITHOUT_WEIGHT
    ]
    check_targets_match("reserve", reserve.targets, sites)
    if not chosen:
        raise no_match_error("reserve", reserve.targets, sites)
    admitted = [role for role in ROLES.values() if role.reserve and getattr(reserve, role.reserve)]
    for site in chosen:
        need = needs.setdefault(site.path, _SiteNeeds())
        merged = mode == "fused" or site.within is not None
        biased = site.within is None or site.bias is not None
        for role in [role for role in admitted if (role.merged or not merged) and (biased or role.stage != Stage.BIAS)]:
            need.want(role.name)
        if merged:
            need.want(letters.WEIGHT)
        else:
            need.rank += reserve.rank * reserve.adapters


def _listed_names(targets: str | tuple[str, ...]) -> tuple[str, ...]:
    """Targets by their names, which may be those of matrices too; keywords and expressions are of modules."""
    return () if isinstance(targets, str) else targets


def _plan_site(site: Site, need: _SiteNeeds, mode: str) -> SitePlan:
    """A site's plan; what is said of the site as a whole is true of every adapter on it."""
    wanted, stages = need.rooms, {ROLES[role].stage for role in need.rooms}
    if mode in {"fused", "baked"}:
        need.reasons.append(Reason(None, site.path, f"mode='{mode}' merges every adapter into the weight"))
    if {Stage.INPUT, Stage.OUTPUT} <= stages:
        need.want(letters.WEIGHT)
        need.reasons.append(Reason(None, site.path, "outputs and inputs are changed, and the sum of both is neither"))
    for role in ROLES.values():
        sizes = sorted(wanted.get(role.name, ()))
        if len(sizes) > 1 and not role.ranked:
            need.want(letters.WEIGHT)
            several = role.unit.format(" and ".join(map(str, sizes)))
            need.reasons.append(Reason(None, site.path, f"{several} do not add up"))
    if wanted.keys() & FOLDABLE:
        for letter in FOLDABLE:
            need.want(letter)
    rooms = {role.name: need.rank if role.ranked else max(wanted.get(role.name, (0,))) for role in ROLES.values()}
    return SitePlan(
        site,
        room={role: room for role, room in rooms.items() if role in wanted and room},
        branches=tuple(need.branches),
        reasons=tuple(need.reasons),
    )
