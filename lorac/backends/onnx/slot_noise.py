"""Seeded noise for slots, by which a program is compared with the graph it was emitted from."""

from collections.abc import Mapping

import torch

from lorac.ir.sites.site import BaseReader, Site, factor_dtype
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.plans import BranchFill, BranchSlot, SitePlan, SiteSlots
from lorac.ir.slots.roles import NoiseScale, SlotSpec

_NOISE_RANK = 3
_SAMPLE_ROWS = 8


def draw_noise(
    plans: Mapping[str, SitePlan], idle: Mapping[str, SiteSlots], base: BaseReader, seed: int = 0
) -> dict[str, SiteSlots]:
    """Draw seeded noise for every slot of every site, about a third as large as the site's output."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: _draw_site_noise(plan, idle[path], noise_scale(plan, base), generator) for path, plan in plans.items()
    }


def noise_scale(plan: SitePlan, base: BaseReader) -> NoiseScale:
    """Return the scale of noise for a site's slots, read from the first rows of its weight."""
    rank = max(min(plan.rank, _NOISE_RANK), plan.least_rank)
    if plan.site.weight is None or not rank:
        return NoiseScale(plan.site, 1.0, rank)
    return NoiseScale(plan.site, float(base.weight(plan.site)[:_SAMPLE_ROWS].float().square().mean().sqrt()), rank)


def _draw_site_noise(plan: SitePlan, idle: SiteSlots, around: NoiseScale, generator: torch.Generator) -> SiteSlots:
    tensors = {}
    for role, room in plan.roles():
        if role.ranked:
            place = SlotSpec(layout=layout_of(plan.site), size=min(room, around.rank))
            tensors[role.name] = role.neutral(place)
        else:
            tensors[role.name] = idle.tensors[role.name].clone(memory_format=torch.contiguous_format)
        role.noise(tensors[role.name], around, generator)
    return SiteSlots(tensors, tuple(_draw_branch_noise(plan.site, branch, generator) for branch in plan.branches))


def _draw_branch_noise(site: Site, branch: BranchSlot, generator: torch.Generator) -> BranchFill:
    """Draw a branch's strength and parameters, in the dtype of their slots."""
    dtype = factor_dtype(site.dtype)
    drawn = [
        torch.randn(shape, generator=generator) * (shape[-1] if shape else 1) ** -0.5
        for shape in branch.params.values()
    ]
    strength = torch.rand(1, generator=generator) + 0.5
    return BranchFill(strength.to(dtype), tuple(noise.to(dtype) for noise in drawn))
