"""What goes into the slot inputs of a lowered program: one tensor per input, from the slots of its site or pack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lorac.ir.algebra import letters
from lorac.ir.graph.attending import NEW, PAST
from lorac.ir.graph.graph import Graph, SlotInput
from lorac.ir.host.sites import factor_dtype
from lorac.ir.slots.emits import record_emitted
from lorac.ir.slots.roles import PACK_RANKS, slot_name, strength_role
from lorac.ir.slots.site import SitePlan, SiteSlots

Tensor = torch.Tensor


def named_tensors(
    inputs: Mapping[str, SlotInput], plans: Mapping[str, SitePlan], slots: Mapping[str, SiteSlots]
) -> dict[str, Tensor]:
    """Slot input -> tensor. Idle branches get zeros of their shape."""
    tensors: dict[str, Tensor] = {}
    by_site: dict[str, dict[str, Tensor]] = {}
    for name, slot in inputs.items():
        if slot.members:
            tensors[name] = packed(slot, [slots[member] for member in slot.members])
            continue
        if slot.site not in by_site:
            by_site[slot.site] = slots[slot.site].named()
        filled = by_site[slot.site].get(slot.role)
        tensors[name] = filled if filled is not None else idle(plans[slot.site], slot.role)
    return tensors


def fed(inputs: Mapping[str, SlotInput], plans: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    """The plans of the sites that have slot inputs: those that the program reaches."""
    reached = {path for slot in inputs.values() for path in (slot.site, *slot.members)}
    return {path: plan for path, plan in plans.items() if path in reached}


def packed(slot: SlotInput, members: Sequence[SiteSlots]) -> Tensor:
    """What the slots of a pack hold: the A's of its sites side by side, or how wide each is."""
    parts = [member.tensors[letters.A] for member in members]
    if slot.role == PACK_RANKS:
        return torch.tensor([part.shape[1] for part in parts])
    return torch.cat(parts, dim=1)


def idle(plan: SitePlan, role: str) -> Tensor:
    """What an idle branch slot holds: strength and parameters of zero."""
    return torch.zeros(plan.branch_shapes()[role], dtype=factor_dtype(plan.site.dtype))


def empty_cache(kept: Mapping[str, tuple[Sequence[Any], torch.dtype]], ids: Tensor) -> dict[str, Tensor]:
    """What a graph's cache holds where nothing came before, for as many tokens as a call brings.

    Args:
        kept: input of the cache -> its shape, of which the first size and the last but one vary, and its dtype.
        ids: the call's token ids (batch, length), all of them new.
    """
    batch, length = ids.shape
    counts = {PAST: 0, NEW: length}
    made = {name: torch.full((batch,), counts[name], dtype=torch.int32) for name in kept if name in counts}
    for name, (shape, dtype) in kept.items():
        if name not in counts:
            made[name] = torch.zeros(batch, int(shape[1]), length, int(shape[3]), dtype=dtype)
    return made


def kept_shapes(graph: Graph) -> dict[str, tuple[Sequence[Any], torch.dtype]]:
    """What ``empty_cache`` asks of the inputs of a graph's cache."""
    values = {name: graph.node(node).meta["val"] for name, node in graph.kept.items()}
    return {name: (tuple(value.shape), value.dtype) for name, value in values.items()}


def grouped_aux(extra: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The extra outputs of the branches that are on, by name and site (``record_emitted``)."""
    aux: dict[str, dict[str, Any]] = {}
    emitted: dict[str, dict[str, list[Any]]] = {}
    for key, value in extra.items():
        name, _, place = key.partition(":")
        path, _, branch = place.rpartition(":")
        if bool(tensors[slot_name(path, strength_role(branch))].any()):
            emitted.setdefault(path, {}).setdefault(name, []).append(value)
    for path, found in emitted.items():
        record_emitted(aux, path, found)
    return aux
