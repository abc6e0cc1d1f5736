"""Contents to try in the slots of an engine: a choice's contents and seeded noise; and the self-test's error."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lorac.backends.onnx.engine import AnyOnnxEngine
from lorac.errors import CompileError, list_some
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.sites.site import BaseReader, factor_dtype
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.plans import BranchFill, SitePlan, SiteSlots
from lorac.ir.slots.roles import ROLES, NoiseScale, SlotSpec

_NOISE_RANK = 3
_SAMPLE_ROWS = 8


class BoundContents:
    """Contents to try in slots that are bound at each call."""

    def __init__(self, engine: AnyOnnxEngine, snapshot: ComposedWeights) -> None:
        self.engine = engine
        self._slots = fill_slots(engine.plans, ComposedWeights(()), engine.base)
        self._idle = self._named(self._slots)
        self._old = self._named(fill_slots(engine.plans, snapshot, engine.base, dict(self._slots)))

    def idle(self, name: str) -> Tensor:
        """Return the content of a slot while no adapter is active."""
        return self._idle[name]

    def old(self) -> Mapping[str, Tensor]:
        """Return the initial contents of the slots."""
        return self._old

    def noise(self, seed: int) -> Mapping[str, Tensor]:
        """Return seeded noise for every slot."""
        return self._named(draw_noise(self.engine.plans, self._slots, self.engine.base, seed))

    def leave(self) -> None:
        """Do nothing, since nothing was written."""

    def _named(self, slots: Mapping[str, SiteSlots]) -> dict[str, Tensor]:
        return collect_slot_tensors(self.engine.slots, self.engine.plans, slots)


class WrittenContents:
    """Contents to try in the engine's memory, since a second copy of all weights would be too large."""

    def __init__(self, engine: AnyOnnxEngine, snapshot: ComposedWeights) -> None:
        self.engine, self._snapshot = engine, snapshot

    def idle(self, name: str) -> Tensor:
        slot = self.engine.slots[name]
        plan = {slot.site: self.engine.plans[slot.site]}
        return collect_slot_tensors({name: slot}, plan, fill_slots(plan, ComposedWeights(()), self.engine.base))[name]

    def old(self) -> Mapping[str, Tensor]:
        self.engine.write(self._snapshot)
        return self._readable()

    def noise(self, seed: int) -> Mapping[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        for buffer in self.engine.buffers.values():
            buffer.forget()
        drawn = self._readable()
        for name, tensor in drawn.items():
            slot = self.engine.slots[name]
            around = noise_scale(self.engine.plans[slot.site], self.engine.base)
            ROLES[slot.role].noise(tensor, around, generator)
        return drawn

    def _readable(self) -> Mapping[str, Tensor]:
        """Return the memory itself if the CPU can read it, otherwise a copy."""
        return {name: tensor.cpu() for name, tensor in self.engine.memory.items()}

    def leave(self) -> None:
        """Undo all writes."""
        self.engine.write(ComposedWeights(()))


TestedContents = BoundContents | WrittenContents
"""Contents to try in the slots of an engine."""


def draw_noise(
    plans: Mapping[str, SitePlan], idle: Mapping[str, SiteSlots], base: BaseReader, seed: int = 0
) -> dict[str, SiteSlots]:
    """Draw seeded noise for every slot of every site, with about a third of the size of the site's output."""
    generator, drawn = torch.Generator().manual_seed(seed), dict[str, SiteSlots]()
    for path, plan in plans.items():
        scale, dtype = noise_scale(plan, base), factor_dtype(plan.site.dtype)
        tensors, branches = dict[str, Tensor](), list[BranchFill]()
        for role, room in plan.roles():
            if role.ranked:
                place = SlotSpec(layout=layout_of(plan.site), size=min(room, scale.rank))
                tensors[role.name] = role.neutral(place)
            else:
                tensors[role.name] = idle[path].tensors[role.name].clone(memory_format=torch.contiguous_format)
            role.noise(tensors[role.name], scale, generator)
        for branch in plan.branches:
            params = [
                torch.randn(shape, generator=generator) * (shape[-1] if shape else 1) ** -0.5
                for shape in branch.params.values()
            ]
            strength = torch.rand(1, generator=generator) + 0.5
            branches.append(BranchFill(strength.to(dtype), tuple(param.to(dtype) for param in params)))
        drawn[path] = SiteSlots(tensors, tuple(branches))
    return drawn


def noise_scale(plan: SitePlan, base: BaseReader) -> NoiseScale:
    """Return the scale of noise for a site's slots, estimated from the first rows of its weight."""
    rank = max(min(plan.rank, _NOISE_RANK), plan.least_rank)
    if plan.site.weight is None or not rank:
        return NoiseScale(plan.site, 1.0, rank)
    return NoiseScale(plan.site, float(base.weight(plan.site)[:_SAMPLE_ROWS].float().square().mean().sqrt()), rank)


def holds_same_values(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have the same values in the same order, regardless of shape."""
    if one.numel() != other.numel():
        return False
    dtype = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.flatten().to(dtype), other.flatten().to(dtype))


def self_test_failure(slots: Sequence[str], defect: str) -> CompileError:
    """Return the error for slots with a defect.

    Args:
        defect: the predicate of the message, such as ``"became constants"``.
    """
    listed = list_some(slots, 4)
    return CompileError(
        f"after emission {len(slots)} slots {defect}: {listed}",
        next_step="this is a bug of lorac's, not of your model: a swap would have a wrong effect",
        code="self_test_failed",
    )
