"""Filling slots: what a composed change puts into a site's slots, and why it may not fit them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lorac.errors import NeedsRecompile
from lorac.ir.algebra.changes import Change, Dense, LowRank, Sparse, SparseSum, identity_blocks, merge, merge_bias
from lorac.ir.host.sites import Site, factor_dtype
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.site import BranchFill, BranchTerm, SitePlan, SiteSlots

Tensor = torch.Tensor


def fill_site(plan: SitePlan, change: Change | None, base: Callable[[], Tensor], bias: Tensor | None) -> SiteSlots:
    """The tensors of one composed change in a site's weight-form slots (branches are filled by ``with_branches``).

    Args:
        plan: the site's plan.
        change: what the active adapters come to, or None for the base.
        base: reads W (out, in); called where the plan binds the weight.
        bias: the base's bias.

    Raises:
        NeedsRecompile: the change does not fit the plan.
    """
    misfit = does_not_fit(plan, change)
    if misfit:
        raise NeedsRecompile(f"'{plan.site.path}' {misfit}")
    layout = layout_of(plan.site)
    tensors: dict[str, Tensor | None] = {}
    low = beside(plan, change)
    if plan.bound:
        merged = None if low is not None else change
        matrix = base() if merged is None else merge(merged, base())
        tensors["weight"] = layout.slot_weight(matrix)
    if plan.bias:
        new_bias = bias if change is None else merge_bias(change, bias)
        tensors["bias"] = torch.zeros(plan.site.out_features, dtype=plan.site.dtype) if new_bias is None else new_bias
    tensors |= _low_rank_slots(plan, low)
    return SiteSlots(**tensors)  # type: ignore[arg-type]


def does_not_fit(plan: SitePlan, change: Change | None) -> str | None:
    """Why a change cannot be held by the plan's slots, or None."""
    if change is None:
        return None
    if plan.bound:
        return None if beside(plan, change) is not None else _does_not_bind(plan, change)
    if isinstance(change, Dense | Sparse | SparseSum):
        return "has no slot for a whole weight"
    if change.rank > plan.rank:
        return f"holds rank {plan.rank}, not {change.rank}"
    return _lacks(plan, change)


def _lacks(plan: SitePlan, change: LowRank) -> str | None:
    """What a change needs besides its pair and the plan has not, or None."""
    if change.t is not None and change.t.shape[-1] != plan.t:
        return f"holds input transforms in blocks of {plan.t}, not {change.t.shape[-1]}"
    extras = {"c": change.c is not None, "d": change.d is not None, "bias": change.e is not None}
    return next((f"has no slot '{role}'" for role, needed in extras.items() if needed > getattr(plan, role)), None)


def _does_not_bind(plan: SitePlan, change: Change) -> str | None:
    if leaves_blocks(plan.site, change):
        return "is a grouped convolution, whose kernel cannot hold a weight that leaves the blocks"
    return "has no slot for a bias" if change.e is not None and not plan.bias else None


def beside(plan: SitePlan, change: Change | None) -> LowRank | None:
    """The change, where it fits the slots beside the weight."""
    if not isinstance(change, LowRank) or plan.rank < change.rank:
        return None
    return None if _lacks(plan, change) else change


def _low_rank_slots(plan: SitePlan, change: LowRank | None) -> dict[str, Tensor | None]:
    layout, site = layout_of(plan.site), plan.site
    dtype = factor_dtype(site.dtype)
    tensors: dict[str, Tensor | None] = {}
    if change is not None and not (plan.g and plan.h):
        change = change.folded()
    if plan.rank:
        a = change.a if change is not None else torch.zeros(site.in_features, 0, dtype=dtype)
        b = change.b if change is not None else torch.zeros(0, site.out_features, dtype=dtype)
        tensors |= {"a": layout.slot_a(a).contiguous(), "b": layout.slot_b(b).contiguous()}
    if plan.t:
        given = change.t if change is not None else None
        tensors["t"] = given if given is not None else identity_blocks(site.in_features, plan.t, dtype).contiguous()
    rank = change.rank if change is not None else 0
    for name, size in (("c", site.out_features), ("d", site.in_features), ("g", rank), ("h", site.out_features)):
        if getattr(plan, name):
            given = getattr(change, name) if change is not None else None
            tensors[name] = given if given is not None else torch.ones(size, dtype=dtype)
    return tensors


def fill_branches(plan: SitePlan, terms: Sequence[tuple[float, BranchTerm]]) -> tuple[BranchFill | None, ...]:
    """Assign active branch terms, in name order, to the plan's branch slots of equal structure.

    Raises:
        NeedsRecompile: a term finds no free slot.
    """
    fills: list[BranchFill | None] = [None] * len(plan.branches)
    for strength, term in terms:
        free = [i for i, slot in enumerate(plan.branches) if slot.key == term.slot.key and fills[i] is None]
        if not free:
            raise NeedsRecompile(f"'{plan.site.path}' has no free slot for a branch {term.slot.key}")
        sample = next((t for t in term.params if t.is_floating_point()), torch.empty(0))
        fills[free[0]] = BranchFill(sample.new_full((1,), strength), term.params)
    return tuple(fills)


def branch_misfit(plan: SitePlan | None, term: BranchTerm) -> str | None:
    """Why a branch finds no slot in a plan, or None."""
    if plan is not None and any(slot.key == term.slot.key for slot in plan.branches):
        return None
    return f"has no slot for a branch {term.slot.key}"


def leaves_blocks(site: Site, change: Change) -> bool:
    """Whether a merged weight has entries that a grouped convolution's kernel cannot hold: it may run live only."""
    if site.conv is None or site.conv.groups == 1:
        return False
    return site.leaves_blocks(merge(change, torch.zeros(site.out_features, site.in_features)))
