"""Rows with choices of their own: their slots one behind the other, branches part by part, or, in training, terms."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lorac.backends.eager.forward_call import ActiveSlots
from lorac.ir.sites import Site
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.execution import FormulaContext, add_branches
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.live_terms import TrainingTerms, run_terms
from lorac.ir.slots.placed_execution import run_placed, stack_site_slots, why_shared
from lorac.ir.slots.plans import BranchSlot, SitePlan, SiteSlots
from lorac.ir.slots.roles import ROLES


def find_shared_slot(plans: Mapping[str, SitePlan], snapshot: ComposedWeights, emitted: Collection[str]) -> str | None:
    """Return why a choice fills slots that all rows of a batch share; None if it does not.

    Args:
        emitted: the extra outputs that are asked for.
    """
    for path, composed in snapshot.composed.items():
        why = why_shared(plans[path]) if composed.change is not None else ""
        why = why or next((ROLES[role].why_shared for role in composed.roles if ROLES[role].why_shared), "")
        why = why or next(filter(None, (_why_shared_branch(term.slot, emitted) for _, term in composed.branches)), "")
        if why:
            return f"at '{path}', {why}"
    return None


def _why_shared_branch(slot: BranchSlot, emitted: Collection[str]) -> str:
    if slot.mixes or slot.reads or slot.once:
        return "its branch reads what a whole call computes"
    return "extra outputs of its branch are asked for" if not set(slot.emits).isdisjoint(emitted) else ""


def stack_choices(contents: Sequence[ActiveSlots], *, fill: bool) -> ActiveSlots:
    """Return what one call needs for several choices, one for each part of its rows.

    Args:
        contents: the slots that each choice fills.
        fill: whether the call reads slots; in training it computes terms.
    """
    touched = frozenset[str]().union(*(content.touched for content in contents))
    return ActiveSlots(
        choice=tuple(dict(active for content in contents for active in content.choice).items()),
        slots={path: stack_site_slots([each.slots[path] for each in contents]) for path in touched if fill},
        touched=touched,
        branches=any(content.branches for content in contents),
        places=tuple(contents),
    )


def run_row_slots(
    plan: SitePlan,
    active: ActiveSlots,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ctx: FormulaContext,
    block: Tensor | None,
) -> Tensor:
    """Return a site's output from the slots of each part of the rows: weight forms at once, then branches by part.

    Args:
        active: the slots of all parts.
        plan, x, weight, bias, ctx, block: as for ``lorac.ir.slots.execution.run_site``.
    """
    slots, path = active.slots[plan.site.path], plan.site.path
    placed = not why_shared(plan) and any(not ROLES[name].why_shared for name in slots.tensors)
    branches = [each.slots[path].branches for each in active.places]
    if not any(fill is not None for fills in branches for fill in fills):
        return run_placed(plan, slots, x, weight, bias)
    base = _run_base(plan.site, x, weight, bias, block)
    y = run_placed(plan, slots, x, weight, bias) if placed else base
    parts = zip(branches, *(tensor.chunk(len(branches)) for tensor in (x, y, base)), strict=True)
    return torch.cat([add_branches(plan, SiteSlots(branches=fills), x, y, base, ctx) for fills, x, y, base in parts])


def _run_base(site: Site, x: Tensor, weight: Tensor | None, bias: Tensor | None, block: Tensor | None) -> Tensor:
    if block is not None:
        return block
    assert weight is not None
    return layout_of(site).base(x, weight, bias)


def run_row_terms(
    site: Site,
    terms: TrainingTerms,
    places: Sequence[ActiveSlots],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    ctx: FormulaContext,
    block: Tensor | None,
) -> Tensor:
    """Return a site's output from the terms of each part of the rows, beside one product with the base's weight.

    Args:
        terms: computed from the adapters' tensors.
        places: the choice of each part.
        x, weight, bias, ctx, block: as for ``run_terms``.
    """
    base, size, first, parts = _run_base(site, x, weight, bias, block), x.shape[0] // len(places), 0, []
    for choice, same in itertools.groupby(place.choice for place in places):
        rows = slice(first, first + size * len(list(same)))
        own = terms.at(site.path, choice)
        part = base[rows]
        parts.append(part if own is None else run_terms(site, own, x[rows], weight, bias, ctx, part))
        first = rows.stop
    return torch.cat(parts)
