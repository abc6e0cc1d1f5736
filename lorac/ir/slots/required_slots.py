"""The slots that every site requires, planned from the adapters' normal forms, the mode and the reserve.

``auto`` and ``live``: low-rank and branch terms run next to the weight, sparse and dense terms in a bound weight.
``fused`` and ``baked``: every term with a weight form is merged into the weight, an input or a constant of the program.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorac.argument_types import check_fields
from lorac.errors import CompileError, OptionError, SiteError, nearest_name, short
from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change, LowRank
from lorac.ir.algebra.operands import FOLDABLE
from lorac.ir.sites.patterns import check_targets_match, no_match_error, select_sites
from lorac.ir.sites.site import KINDS_WITHOUT_WEIGHT, Site, SiteKind
from lorac.ir.slots.filling import leaves_blocks, why_merged_weight
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.plans import BranchSlot, PreparedAdapter, RankPolicy, Reason, SitePlan
from lorac.ir.slots.roles import ROLES, Stage, keeps_base_weight, tensors_by_role

MODES = ("auto", "live", "fused", "baked")
_MERGING_MODES = frozenset({"fused", "baked"})
_MOST_PER_ROW = 1 << 20
"""The most values in a layer that may differ by row within one call; for larger layers separate calls cost less."""


@dataclass(frozen=True, kw_only=True)
class Reserve:
    """Slots for adapters that are added later.

    Attributes:
        targets: the sites, as an adapter's ``targets``.
        rank: largest rank of one adapter.
        adapters: how many may be active together.
        scales: make room for DoRA-like adapters (an output scale and a shift).
        weights: make room for any adapter with a weight form, in a bound weight.
        virtual_tokens: the most virtual tokens that an adapter may add to a targeted embedding (prompt tuning).
        outputs: name or path of a layer -> the most outputs (tokens of an embedding) of an adapter's layer that
            replaces it (``modules_to_save``).
    """

    targets: str | Sequence[str] = "all-linear"
    rank: int = 16
    adapters: int = 1
    scales: bool = False
    weights: bool = False
    virtual_tokens: int = 0
    outputs: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            object.__setattr__(self, "targets", tuple(self.targets))
        check_fields(self)


@dataclass
class _SiteNeeds:
    """The slots that the terms at one site need.

    Attributes:
        rooms: role -> every size that a term needs.
        rank: the sum of the terms' ranks.
        merges: whether a term that does not replace the layer is merged into the weight.
    """

    rooms: dict[str, set[int]] = field(default_factory=dict)
    rank: int = 0
    branches: list[BranchSlot] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    merges: bool = False

    def require(self, role: str, size: int = 1) -> None:
        """Add a slot of a role."""
        self.rooms.setdefault(role, set()).add(size)


def plan_sites(
    sites: Mapping[str, Site],
    prepared: Mapping[str, PreparedAdapter],
    mode: str,
    reserve: Reserve | None = None,
    ranks: Callable[[Site], RankPolicy] = lambda _: RankPolicy.FROM_ZERO,
) -> dict[str, SitePlan]:
    """Plan the slots of every touched or reserved site, in the order of ``sites``.

    Args:
        sites: every site of the model.
        mode: one of ``MODES``.
        reserve: room for later adapters.
        ranks: the policy for the ranks of a site's pair on the target.

    Raises:
        OptionError: the mode does not exist.
        CompileError: a branch, a weight that does not fit a grouped convolution, or a change of a quantised weight
            would have to be merged.
        SiteError: ``reserve`` names no site.
    """
    if mode not in MODES:
        raise OptionError(
            f"there is no mode {short(mode)}",
            nearest=nearest_name(str(mode), MODES, alike=0.6),
            next_step="give 'auto', 'live' (unfused), 'fused' (merged by each swap) or 'baked' (merged for good)",
        )
    needs: dict[str, _SiteNeeds] = {}
    terms = [(name, path, prepared[name]) for name in sorted(prepared) for path in prepared[name].in_order()]
    for name, path, adapter in terms:
        need = needs.setdefault(path, _SiteNeeds())
        if path in adapter.changes:
            _add_change(need, name, sites[path], adapter.changes[path], mode, replaces=path in adapter.sizes)
        if path in adapter.branches:
            slot = adapter.branches[path].slot
            if mode in _MERGING_MODES:
                keep = "mode='live' (or 'auto') keeps it in the graph"
                raise CompileError(
                    f"adapter '{name}' at '{path}' is a branch with no weight form, so it cannot be {mode}",
                    next_step=f"{keep}; {slot.instead}" if slot.instead else keep,
                    code="not_mergeable",
                )
            need.branches.append(slot)
    if reserve is not None:
        _add_reserve(needs, sites, reserve, mode)
    for site in (site for site in sites.values() if site.own_size):
        roles = (operands.WEIGHT,) if site.kind is SiteKind.EMBEDDING else (operands.WEIGHT, operands.BIAS)
        for role in roles:
            needs.setdefault(site.path, _SiteNeeds()).require(role)
    planned = {path: _plan_site(site, needs[path], mode) for path, site in sites.items() if path in needs}
    for plan in planned.values():
        if plan.bound and plan.site.packed:
            merging = mode in _MERGING_MODES
            why = "" if merging or not plan.reasons else f", and {plan.reasons[0]}"
            raise quantized_merge_error(plan.site, why, merging)
    return {path: replace(plan, ranks=ranks(plan.site)) for path, plan in planned.items()}


def quantized_merge_error(site: Site, why: str, merging: bool = False) -> CompileError:
    """Return the error for a merge into a quantised weight.

    Args:
        site: the site of the quantised weight.
        why: the reason for merging, if it is not the mode.
        merging: whether the mode merges every adapter.
    """
    live = "mode='live' (or 'auto') runs low-rank adapters next to it; " if merging else ""
    return CompileError(
        f"nothing can be merged into the {site.packed} weight of '{site.path}'{why}",
        next_step=f"{live}merging needs a base that is not quantised (leave weights= out, or merge first, with "
        "mode='baked')",
        code="not_mergeable",
    )


def needs_merged_weight(site: Site, change: Change) -> bool:
    """Return whether a change must be merged into the weight even in live mode."""
    return not (isinstance(change, LowRank) and keeps_base_weight(layout_of(site), change))


def _add_change(need: _SiteNeeds, name: str, site: Site, change: Change, mode: str, *, replaces: bool) -> None:
    bound = mode in _MERGING_MODES or needs_merged_weight(site, change)
    need.merges |= bound and not replaces
    if bound and leaves_blocks(site, change):
        raise CompileError(
            f"the weight that '{name}' gives '{site.path}' is not block-diagonal, as its grouped convolution needs",
            next_step="use mode='live' (or 'auto'), which runs a low-rank adapter next to it",
            code="not_mergeable",
        )
    if change.e is not None:
        if site.within is not None and site.bias is None:
            raise SiteError(
                f"adapter '{name}' has a bias for '{site.path}', and its module '{site.within}' has none",
                next_step="add the module to exclude=, or train the adapter without a bias",
            )
        need.require(operands.BIAS)
    if mode in _MERGING_MODES:
        need.require(operands.WEIGHT)
    elif isinstance(change, LowRank) and not needs_merged_weight(site, change):
        need.rank += change.rank
        for role, tensor in tensors_by_role(change).items():
            need.require(role, ROLES[role].room(tensor))
    else:
        why = "changes the site's input, which has no axis of features"
        if not isinstance(change, LowRank):
            why = why_merged_weight(change)
        elif site.within is not None:
            why = "acts on a weight that its module reads in its own forward, where nothing can run next to it"
        need.require(operands.WEIGHT)
        need.reasons.append(Reason(name, site.path, why))


def _add_reserve(needs: dict[str, _SiteNeeds], sites: Mapping[str, Site], reserve: Reserve, mode: str) -> None:
    # A list of names may select matrices too; keywords and regular expressions match modules only.
    names = () if isinstance(reserve.targets, str) else reserve.targets
    found = select_sites(sites, reserve.targets, parameters=names)
    chosen = [site for site in found if site.kind not in KINDS_WITHOUT_WEIGHT]
    check_targets_match("reserve", reserve.targets, sites)
    if not chosen:
        raise no_match_error("reserve", reserve.targets, sites)
    admitted = [role for role in ROLES.values() if role.reserve and getattr(reserve, role.reserve)]
    for site in chosen:
        need = needs.setdefault(site.path, _SiteNeeds())
        merged = mode == "fused" or site.within is not None
        biased = site.within is None or site.bias is not None
        for role in [role for role in admitted if (role.merged or not merged) and (biased or role.stage != Stage.BIAS)]:
            if not role.padded:
                need.require(role.name)
            elif site.kind is SiteKind.EMBEDDING:
                need.require(role.name, getattr(reserve, role.reserve))
        need.merges |= reserve.weights and not site.own_size
        if merged:
            need.require(operands.WEIGHT)
        else:
            need.rank += reserve.rank * reserve.adapters


def _plan_site(site: Site, need: _SiteNeeds, mode: str) -> SitePlan:
    """Return a site's plan; a reason without an adapter applies to every adapter at the site."""
    stages = {ROLES[role].stage for role in need.rooms}
    if mode in _MERGING_MODES:
        need.reasons.append(Reason(None, site.path, f"mode='{mode}' merges every adapter into the weight"))
    if {Stage.INPUT, Stage.OUTPUT} <= stages:
        need.require(operands.WEIGHT)
        need.reasons.append(Reason(None, site.path, "changes of outputs and of inputs do not add up"))
    for role in ROLES.values():
        sizes = sorted(need.rooms.get(role.name, ()))
        if len(sizes) > 1 and not (role.ranked or role.padded):
            need.require(operands.WEIGHT)
            different = role.unit.format(" and ".join(map(str, sizes)))
            need.reasons.append(Reason(None, site.path, f"{different} do not add up"))
    if need.rooms.keys() & FOLDABLE:
        for role_name in FOLDABLE:
            need.require(role_name)
    own = site.kind is SiteKind.LINEAR and site.is_resizable
    rooms = {name: need.rank if ROLES[name].ranked else max(need.rooms[name]) for name in ROLES if name in need.rooms}
    return SitePlan(
        site,
        room={name: room for name, room in rooms.items() if room},
        branches=tuple(need.branches),
        reasons=tuple(need.reasons),
        row_weights=operands.WEIGHT in need.rooms
        and not need.merges
        and own
        and site.in_features * site.out_features <= _MOST_PER_ROW,
    )
