"""Composition of the active adapters of a choice, and filling of every slot with the result.

The result is a pure function of the plans, the active adapters and the base; it does not depend on earlier swaps or
other registered adapters. So a swap is bit-identical to a fresh compile.
"""

import functools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from lorac.errors import ChoiceError
from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change, LowRank, compose, list_tensors
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.filling import fill_site, filled_roles, find_missing_room, why_merged_weight
from lorac.ir.slots.invocation import Invocations
from lorac.ir.slots.plans import BranchTerm, PreparedAdapter, Reason, SitePlan, SiteSlots
from lorac.ir.slots.prefix import Prefix


@dataclass(frozen=True, eq=False)
class ComposedSite:
    """The composition of the active adapters at one site.

    Attributes:
        change: the sum of the adapters' weight forms.
        branches: strength and term of each branch.
        roles: the roles whose slots the change fills.
        reasons: why the change fills the weight's slot, if it does.
        size: the layer's size for this choice, where adapters replace the layer by one of another size
            (``Site.own_size``); else 0.
    """

    change: Change | None = None
    branches: tuple[tuple[float, BranchTerm], ...] = ()
    roles: tuple[str, ...] = ()
    reasons: tuple[Reason, ...] = ()
    size: int = 0


@dataclass(frozen=True, eq=False)
class ComposedWeights:
    """A choice of adapters, composed at every site that it touches.

    Attributes:
        prefix: the virtual tokens before each sequence.
    """

    choice: Choice
    composed: Mapping[str, ComposedSite] = field(default_factory=dict)
    invocations: Invocations = field(default_factory=dict)
    prefix: Prefix | None = None

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Path -> size, for layers that adapters resize."""
        return {path: site.size for path, site in self.composed.items() if site.size}

    def tensors(self) -> list[Tensor]:
        """Return the tensors of all changes and branches."""
        sites = self.composed.values()
        own = [tensor for site in sites if site.change is not None for tensor in list_tensors(site.change)]
        own += [] if self.prefix is None else [self.prefix.rows]
        return [*own, *(tensor for site in sites for _, term in site.branches for tensor in term.params)]


def compose_choice(
    plans: Mapping[str, SitePlan], prepared: Mapping[str, PreparedAdapter], choice: Choice, base: BaseReader
) -> ComposedWeights:
    """Compose the active adapters site by site.

    Raises:
        ChoiceError: a rank for a method that cannot be truncated; a mixture of layer sizes or of prompts; a prompt with
            a strength other than 1.
    """
    active = [(name, how.strength, truncate_adapter(name, prepared[name], how.rank)) for name, how in choice]
    prompts = [(name, t, p.prefix) for name, t, p in active if p.prefix is not None]
    invocations = {name: one.invocation for name, _, one in active if one.invocation}
    if len(prompts) > 1 or any(t != 1 for _, t, _ in prompts) or (prompts and invocations):
        listed = ", ".join([*(f"'{name}' (strength {t:g})" for name, t, _ in prompts), *map(repr, invocations)])
        raise ChoiceError(
            "virtual tokens cannot be added up: a row takes one prompt, at strength 1, besides adapters that act on "
            f"every token; active are {listed}",
            next_step="activate one of these adapters as it is, or give each row of a batch its own: adapters=[...]",
        )
    composed = {}
    for path, plan in plans.items():
        terms = {name: (t, p.changes[path]) for name, t, p in active if path in p.changes}
        branches = tuple((t, p.branches[path]) for _, t, p in active if path in p.branches)
        if terms or branches:
            change = compose(list(terms.values()), functools.partial(base.weight, plan.site))
            composed[path] = place_change(plan, change, terms, branches)
            if plan.site.own_size:
                sizes = {name: p.sizes.get(path, plan.site.own_size) for name, _, p in active if name in terms}
                if len({*sizes.values()}) > 1:
                    listed = ", ".join(f"'{name}' has {size}" for name, size in sizes.items())
                    raise ChoiceError(
                        f"layers of several sizes cannot be mixed at '{path}': {listed} rows",
                        next_step="activate one of these adapters, or give each row of a batch its own: adapters=[...]",
                    )
                composed[path] = replace(composed[path], size=max(sizes.values()))
    return ComposedWeights(choice, composed, invocations, prompts[0][2] if prompts else None)


def place_change(
    plan: SitePlan, change: Change | None, names: Collection[str], branches: tuple[tuple[float, BranchTerm], ...] = ()
) -> ComposedSite:
    """Find the roles of a plan that a change fills; return them with the change.

    Args:
        plan: the site's slots.
        change: a sum of weight forms.
        names: names of the change's adapters.
        branches: strength and term of each of the site's branches.
    """
    roles = filled_roles(plan, change)
    reasons = _merge_reasons(plan, change, names) if change is not None and operands.WEIGHT in roles else ()
    return ComposedSite(change, branches, roles, reasons)


def _merge_reasons(plan: SitePlan, change: Change, names: Collection[str]) -> tuple[Reason, ...]:
    """Return why a change is merged: the plan's reasons for its adapters or for the site, or a missing slot."""
    own = tuple(reason for reason in plan.reasons if reason.adapter in names)
    general = tuple(reason for reason in plan.reasons if reason.adapter is None)
    fits_something = isinstance(change, LowRank) and not all(role.merged for role, _ in plan.roles())
    if own or (general and not fits_something):
        return own or general
    if isinstance(change, LowRank):
        return (Reason(None, plan.site.path, f"the site {find_missing_room(plan, change)}"),)
    only = next(iter(names)) if len(names) == 1 else None
    why = why_merged_weight(change)
    return (Reason(only, plan.site.path, why if only is not None else f"the sum {why}"),)


def fill_slots(
    plans: Mapping[str, SitePlan], weights: ComposedWeights, base: BaseReader, idle: dict[str, SiteSlots] | None = None
) -> dict[str, SiteSlots]:
    """Return the tensors of every site's slots for a choice, including idle slots.

    Args:
        plans: the sites' slots.
        weights: the composed choice.
        base: reads base weights.
        idle: path -> the slots of idle sites; missing ones are added. Pass one dict to several calls to share these
            tensors; for bound weights they are as large as the base.
    """
    idle = {} if idle is None else idle
    filled = {}
    for path, plan in plans.items():
        composed = weights.composed.get(path)
        if composed is not None:
            filled[path] = fill_site(plan, composed.change, composed.roles, composed.branches, base, composed.size)
            continue
        if path not in idle:
            idle[path] = fill_site(plan, None, (), (), base)
        filled[path] = idle[path]
    return filled


def truncate_adapter(name: str, prepared: PreparedAdapter, rank: int | None) -> PreparedAdapter:
    """Truncate the low-rank changes of an adapter to their first ``rank`` components.

    Raises:
        ChoiceError: the adapter's method cannot be truncated.
    """
    if rank is None:
        return prepared
    power = prepared.truncatable
    if power is None:
        raise ChoiceError(
            f"'{name}' cannot be truncated to rank {rank}: its method does not allow it",
            next_step="leave rank= out, or train a lorac.DyLoRA, which allows it",
        )
    changes = {path: v.truncated(rank, power) if isinstance(v, LowRank) else v for path, v in prepared.changes.items()}
    return replace(prepared, changes=changes)
