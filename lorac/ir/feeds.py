"""What goes into the slot inputs of a lowered program: one tensor per input, from the slots of its site or pack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lorac.ir.extras import record_emitted
from lorac.ir.fused import FusedBuffer
from lorac.ir.graph import SlotInput
from lorac.ir.kinds import kind_of
from lorac.ir.slots import SitePlan, SiteSlots
from lorac.ir.snapshot import BaseReader
from lorac.ir.types import SiteKind

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
    parts = [member.a for member in members if member.a is not None]
    if slot.role == "pack.ranks":
        return torch.tensor([part.shape[1] for part in parts])
    return torch.cat(parts, dim=1)


def idle(plan: SitePlan, role: str) -> Tensor:
    """What an idle branch slot holds: strength and parameters of zero."""
    index, _, part = role.removeprefix("branch").partition(".")
    shape = (1,) if part == "t" else list(plan.branches[int(index)].params.values())[int(part)]
    return torch.zeros(shape)


def fused_buffers(plans: Mapping[str, SitePlan], base: BaseReader) -> tuple[dict[str, FusedBuffer], dict[str, Tensor]]:
    """A buffer per bound weight, in slot layout and holding the base, and the memory by slot name."""
    buffers, memory = {}, {}
    for path, plan in plans.items():
        if not plan.bound:
            continue
        site = plan.site
        unchanged = _held(base.weight(site))
        weight = kind_of(site).layout_weight(unchanged()).clone(memory_format=torch.contiguous_format)
        memory[f"{path}:weight"] = weight
        bias = None
        if plan.bias:
            original = base.bias(site)
            bias = torch.zeros(site.out_features) if original is None else original.clone()
            memory[f"{path}:bias"] = bias
        matrix_of = _matrix_view(plan)
        buffers[path] = FusedBuffer(site, weight, matrix_of, unchanged, bias, base.bias(site))
    return buffers, memory


def _held(tensor: Tensor) -> Callable[[], Tensor]:
    """A reader of one tensor; to map a file anew at every swap costs as much as the write itself."""
    return lambda: tensor


def _matrix_view(plan: SitePlan) -> Any:
    site = plan.site
    if site.kind in {SiteKind.LINEAR, SiteKind.EMBEDDING}:
        return lambda buffer: buffer.t()
    return site.present


def grouped_aux(extra: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """The extra outputs of the branches that are on, by name and site (``record_emitted``)."""
    aux: dict[str, dict[str, Any]] = {}
    emitted: dict[str, dict[str, list[Any]]] = {}
    for key, value in extra.items():
        name, _, place = key.partition(":")
        path, _, branch = place.rpartition(":")
        if bool(tensors[f"{path}:{branch}.t"].any()):
            emitted.setdefault(path, {}).setdefault(name, []).append(value)
    for path, found in emitted.items():
        record_emitted(aux, path, found)
    return aux


def slot_to_json(slot: SlotInput) -> dict[str, Any]:
    """A slot input as JSON."""
    return {**vars(slot), "members": list(slot.members)}


def slot_from_json(stored: Mapping[str, Any]) -> SlotInput:
    """The inverse of ``slot_to_json``."""
    return SlotInput(**{**stored, "members": tuple(stored["members"])})
