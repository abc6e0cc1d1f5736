"""Filling of a site's slots with a composed change, and the reasons why a change may not fit."""

import functools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lorac.errors import NeedsRecompile
from lorac.ir.algebra import operands
from lorac.ir.algebra.changes import Change, LowRank, Sparse, SparseSum, merge_bias, merge_weight
from lorac.ir.algebra.operands import FOLDABLE
from lorac.ir.sites.site import BaseReader, Site, SiteKind, factor_dtype
from lorac.ir.slots.layouts import layout_of, mark_beyond
from lorac.ir.slots.plans import BranchFill, BranchTerm, SitePlan, SiteSlots
from lorac.ir.slots.roles import ROLES, SlotSpec, tensors_by_role


def fill_site(
    plan: SitePlan,
    change: Change | None,
    roles: Sequence[str],
    branches: Sequence[tuple[float, BranchTerm]],
    base: BaseReader,
    size: int = 0,
) -> SiteSlots:
    """Return the tensors of a site's slots, filled with one composed change and the site's branches.

    Args:
        change: the composed change of the active adapters, or None for the base.
        roles: the roles whose slots the change fills (``filled_roles``).
        branches: strength and term of each branch.
        base: reads W (out, in) if the plan binds the weight, and the bias.
        size: the layer's size where adapters replace the layer by one of another size; 0 for the model's size.

    Raises:
        NeedsRecompile: the change or a branch does not fit the plan.
    """
    new: dict[str, Tensor] = {}
    layout, rank, bias = layout_of(plan.site), 0, base.bias(plan.site)
    weight = functools.partial(base.weight, plan.site)
    if operands.WEIGHT in roles and change is not None:
        misfit = find_misfit(plan, change)
        if misfit:
            raise NeedsRecompile(
                f"'{plan.site.path}' {misfit}", next_step="compile again with the adapter in adapters="
            )
        new[operands.WEIGHT] = merge_weight(change, weight())
    elif isinstance(change, LowRank):
        new, rank = tensors_by_role(_fold_to_fit(plan, change)), change.rank
    if change is not None and (new_bias := merge_bias(change, bias)) is not None:
        new[operands.BIAS] = new_bias
    tensors = {}
    for role, room in plan.roles():
        extent = max(rank, plan.least_rank) if role.ranked else room
        spec = SlotSpec(layout=layout, size=extent, weight=weight, bias=bias)
        tensors[role.name] = role.filled(spec, new.get(role.name))
    marked = operands.WEIGHT if plan.site.kind is SiteKind.EMBEDDING else operands.BIAS
    if plan.site.own_size and (change is None or marked == operands.BIAS):
        tensors[marked] = tensors[marked].clone()
        mark_beyond(tensors[marked], plan.site, size)
    fills: list[BranchFill | None] = [None] * len(plan.branches)
    for strength, term in branches:  # in name order, each into a free slot of the same structure
        free = [i for i, slot in enumerate(plan.branches) if slot.key == term.slot.key and fills[i] is None]
        if not free:
            raise NeedsRecompile(
                f"'{plan.site.path}' has no free slot for {_describe_branch(term)}",
                next_step="compile again with all adapters that are active together in adapters=",
            )
        fills[free[0]] = BranchFill(strength_tensor(term, plan.site, strength), term.params)
    return SiteSlots(tensors, tuple(fills))


def filled_roles(plan: SitePlan, change: Change | None) -> tuple[str, ...]:
    """Return the roles whose slots a change fills, in the table's order; other slots keep their neutral values."""
    if change is None:
        return ()
    filled: Iterable[str] = (operands.WEIGHT,)
    if isinstance(change, LowRank) and not find_missing_room(plan, change):
        filled = tensors_by_role(_fold_to_fit(plan, change))
    return tuple(filled) if change.e is None else (*filled, operands.BIAS)


def why_merged_weight(change: Change) -> str:
    """Return why a change that is not low-rank needs a merged weight."""
    return f"is {'sparse' if isinstance(change, Sparse | SparseSum) else 'dense'} and so needs a merged weight"


def _fold_to_fit(plan: SitePlan, change: LowRank) -> LowRank:
    """Return a change for a plan: if the plan has no slots for the pair's scales, they are folded into the pair."""
    return change if not change.scales or plan.room.keys() >= FOLDABLE else change.folded()


def find_misfit(plan: SitePlan, change: Change) -> str | None:
    """Return why a change does not fit a plan's slots; None if it fits."""
    missing = find_missing_room(plan, change) if isinstance(change, LowRank) else "has no slot for a whole weight"
    if not missing or not plan.bound:
        return missing
    if leaves_blocks(plan.site, change):
        return "is a grouped convolution, and its kernel holds only block-diagonal weights"
    return "has no slot for a bias" if change.e is not None and operands.BIAS not in plan.room else None


def find_missing_room(plan: SitePlan, change: LowRank) -> str | None:
    """Return why a site has no slot for a low-rank change next to its weight; None if it has.

    Foldable scales need no slot.
    """
    tensors = tensors_by_role(change)
    needed = [(ROLES[name], ROLES[name].room(tensor)) for name, tensor in tensors.items() if name not in FOLDABLE]
    for role, size in [*needed, *([(ROLES[operands.BIAS], 1)] if change.e is not None else [])]:
        room = plan.room.get(role.name, 0)
        if not room and not role.ranked:
            return f"has no slot '{role.name}'"
        if size > room or (size != room and not (role.ranked or role.padded)):
            return f"holds {role.unit.format(room)}, not {size}"
    return None


def strength_tensor(term: BranchTerm, site: Site, strength: float) -> Tensor:
    """Return a branch's strength (1,) for its slot, in the factors' dtype and on the parameters' device."""
    device = next((tensor.device for tensor in term.params), None)
    return torch.full((1,), strength, dtype=factor_dtype(site.dtype), device=device)


def find_branch_misfit(plan: SitePlan | None, term: BranchTerm) -> str | None:
    """Return why a plan has no slot for a branch; None if it has one."""
    if plan is not None and any(slot.key == term.slot.key for slot in plan.branches):
        return None
    return f"has no slot for {_describe_branch(term)}"


def _describe_branch(term: BranchTerm) -> str:
    """Describe a branch by its parameters; hyper-parameters, which also decide whether it fits, are left out."""
    return f"a branch with {', '.join(f'{name} {list(shape)}' for name, shape in term.slot.params.items())}"


def leaves_blocks(site: Site, change: Change) -> bool:
    """Return whether a merged weight does not fit a grouped convolution's kernel, so that the change only runs live."""
    if site.conv is None or site.conv.groups == 1:
        return False
    return site.leaves_blocks(merge_weight(change, torch.zeros(site.out_features, site.in_features)))
