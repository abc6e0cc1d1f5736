"""Rows with choices of their own: their slots one behind the other, or, in training, their terms."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorac.backends.eager.forward_call import ActiveSlots
from lorac.ir.sites import Site
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.execution import FormulaContext
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.live_terms import TrainingTerms, run_terms
from lorac.ir.slots.placed_execution import stack_site_slots, why_shared
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.roles import ROLES


def find_shared_slot(plans: Mapping[str, SitePlan], snapshot: ComposedWeights) -> str | None:
    """Return why a choice fills slots that all rows of a batch share; None if it does not."""
    for path, composed in snapshot.composed.items():
        why = "a branch is the same for all rows" if composed.branches else why_shared(plans[path])
        why = why or next((ROLES[role].why_shared for role in composed.roles if ROLES[role].why_shared), "")
        if why:
            return f"at '{path}', {why}"
    return None


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
        places=tuple(content.choice for content in contents),
    )


def run_row_terms(
    site: Site,
    terms: TrainingTerms,
    places: Sequence[Choice],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ctx: FormulaContext,
) -> Tensor:
    """Return a site's output from the terms of each part of the rows, beside one product with the base's weight.

    Args:
        terms: computed from the adapters' tensors.
        places: the choice of each part.
        x, weight, bias, ctx: as for ``run_terms``.
    """
    base, size, first, parts = layout_of(site).base(x, weight, bias), x.shape[0] // len(places), 0, []
    for choice, same in itertools.groupby(places):
        rows = slice(first, first + size * len(list(same)))
        own = terms.at(site.path, choice)
        part = base[rows]
        parts.append(part if own is None else run_terms(site, own, x[rows], weight, bias, ctx, part))
        first = rows.stop
    return torch.cat(parts)
