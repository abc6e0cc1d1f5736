"""Rows with different choices: slots are stacked, branches run part by part, and training computes terms per part."""

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from lorac.backends.eager.forward_call import ActiveSlots
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.execution import SiteCall, run_site
from lorac.ir.slots.live_terms import TrainingTerms, run_terms
from lorac.ir.slots.placed_execution import run_placed, stack_site_slots, why_shared
from lorac.ir.slots.plans import SitePlan


def find_shared_slot(plans: Mapping[str, SitePlan], snapshot: ComposedWeights, emitted: Collection[str]) -> str | None:
    """Return the reason why all rows of a batch must share slots that a choice fills; None if they need not.

    Args:
        emitted: the requested extra outputs.
    """
    for path, composed in snapshot.composed.items():
        why, slots = why_shared(plans[path]), [term.slot for _, term in composed.branches]
        if not why and any(slot.mixes or slot.reads or slot.once for slot in slots):
            why = "its branch reads values that a whole call computes"
        if not why and any(not set(slot.emits).isdisjoint(emitted) for slot in slots):
            why = "extra outputs of its branch are asked for"
        if why:
            return f"at '{path}', {why}"
    return None


def stack_choices(plans: Mapping[str, SitePlan], contents: Sequence[ActiveSlots], *, fill: bool) -> ActiveSlots:
    """Return the slots of a call with several choices, each of which is for one part of the rows.

    Args:
        plans: the slots of each site.
        contents: the slots that each choice fills.
        fill: whether the call reads slots; training calls compute terms instead.
    """
    touched = frozenset[str]().union(*(content.touched for content in contents))
    apart = frozenset(path for path in touched if why_shared(plans[path])).union(*(each.apart for each in contents))
    placed = {path: [each.slots[path] for each in contents] for path in touched - apart if fill}
    return ActiveSlots(
        choice=tuple(dict(active for content in contents for active in content.choice).items()),
        slots={path: stack_site_slots(plans[path], each) for path, each in placed.items()},
        touched=touched,
        branches=any(content.branches for content in contents),
        places=tuple(contents),
        invocations={name: ids for content in contents for name, ids in content.invocations.items()},
    )


def run_row_slots(plan: SitePlan, active: ActiveSlots, call: SiteCall) -> Tensor:
    """Return a site's output for all parts of the rows: at once if the slots have places, otherwise part by part.

    Args:
        plan, call: as for ``lorac.ir.slots.execution.run_site``.
        active: the slots of all parts.
    """
    slots, path, count = active.slots.get(plan.site.path), plan.site.path, len(active.places)
    if slots is not None:
        return run_placed(plan, slots, call)
    blocks = [None] * count if call.block is None else call.block.chunk(count)
    parts = (dataclasses.replace(call, x=x, block=y) for x, y in zip(call.x.chunk(count), blocks, strict=True))
    return torch.cat([run_site(plan, each.slots[path], p) for each, p in zip(active.places, parts, strict=True)])


def run_row_terms(terms: TrainingTerms, places: Sequence[ActiveSlots], call: SiteCall) -> Tensor:
    """Return a site's output from each part's terms, with one product with the base weight for all parts.

    Args:
        terms: the terms from the adapters' tensors.
        places: the slots of each part, with its choice.
        call: as for ``run_terms``.
    """
    size, first, parts = call.x.shape[0] // len(places), 0, list[Tensor]()
    base = call.base()
    for choice, same in itertools.groupby(place.choice for place in places):
        rows = slice(first, first + size * len(list(same)))
        own = terms.at(call.ctx.own_site.path, choice)
        acting = {name: tokens.reshape(len(base), -1)[rows] for name, tokens in call.acting.items()}
        part = dataclasses.replace(call, x=call.x[rows], block=base[rows], acting=acting)
        parts.append(part.base() if own is None else run_terms(own, part))
        first = rows.stop
    return torch.cat(parts)
