"""What a choice of adapters puts into every slot.

A snapshot is a pure function of the plans, the active adapters and the base: never of history, nor of what else is
registered. That is what makes a swap bit-identical to a fresh compile.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from lorac.errors import ChoiceError
from lorac.ir.algebra.changes import Change, LowRank, compose
from lorac.ir.host.sites import BaseReader
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.filling import fill_branches, fill_site
from lorac.ir.slots.site import BranchTerm, Prepared, SitePlan, SiteSlots

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class Composed:
    """What the active adapters come to at one site."""

    change: Change | None = None
    branches: tuple[tuple[float, BranchTerm], ...] = ()


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A choice, and what it comes to at every site that it touches."""

    choice: Choice
    composed: Mapping[str, Composed] = field(default_factory=dict)


def compose_choice(
    plans: Mapping[str, SitePlan], prepared: Mapping[str, Prepared], choice: Choice, base: BaseReader
) -> Snapshot:
    """Compose the active adapters site by site.

    Raises:
        ChoiceError: a rank was asked for that a method cannot be cut to.
    """
    active = [(how.strength, _cut(name, prepared[name], how.rank)) for name, how in choice]
    composed = {}
    for path, plan in plans.items():
        terms = [(t, p.changes[path]) for t, p in active if path in p.changes]
        branches = tuple((t, p.branches[path]) for t, p in active if path in p.branches)
        if terms or branches:
            composed[path] = Composed(compose(terms, functools.partial(base.weight, plan.site)), branches)
    return Snapshot(choice, composed)


def slots_of(
    plans: Mapping[str, SitePlan], snapshot: Snapshot, base: BaseReader, idle: dict[str, SiteSlots] | None = None
) -> dict[str, SiteSlots]:
    """The tensors of a snapshot for every site's slots, idle slots included.

    Args:
        plans: the sites' slots.
        snapshot: the choice.
        base: reads base weights.
        idle: what idle sites hold, by path; what it lacks is added. Snapshots that share it share those tensors,
            which with bound weights are as large as the base's.
    """
    idle = {} if idle is None else idle
    filled = {}
    for path, plan in plans.items():
        composed = snapshot.composed.get(path)
        if composed is not None:
            filled[path] = _filled(plan, composed, base)
            continue
        if path not in idle:
            idle[path] = _filled(plan, Composed(), base)
        filled[path] = idle[path]
    return filled


def _filled(plan: SitePlan, composed: Composed, base: BaseReader) -> SiteSlots:
    slots = fill_site(plan, composed.change, functools.partial(base.weight, plan.site), base.bias(plan.site))
    return replace(slots, branches=fill_branches(plan, composed.branches))


def _cut(name: str, prepared: Prepared, rank: int | None) -> Prepared:
    if rank is None:
        return prepared
    power = prepared.truncatable
    if power is None:
        raise ChoiceError(
            f"'{name}' cannot be cut to rank {rank}: its method is not trained to be truncated",
            next_step="lorac.DyLoRA is; lorac.to_lora(adapter, rank=...) approximates others",
        )
    changes = {path: v.truncated(rank, power) if isinstance(v, LowRank) else v for path, v in prepared.changes.items()}
    return Prepared(changes, prepared.branches, power)
