"""The five masks of SHiRA (arXiv 2406.13175, section 3.2), which choose the trained positions of a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lorac.errors import OptionError, nearest_name
from lorac.variants.base import InitContext, Site, Tensor


@dataclass(frozen=True)
class MaskMaker:
    """The number of positions that a mask has at a site, and a function that chooses them.

    Attributes:
        entries: site -> the number K of positions.
        make: context -> (2, K) int64, row 0 the out index, row 1 the in index, in row-major order.
    """

    entries: Callable[[Site], int]
    make: Callable[[InitContext], Tensor]


def top_entries(scores: Tensor, count: int) -> Tensor:
    """Return the positions (2, count) of the largest scores, in row-major order; ties go to the lowest index."""
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices[:count]
    return _positions(order, scores.shape[1])


def magnitude_mask(count: int, task: int = 0) -> MaskMaker:
    """Choose the largest |W| (WM); task t takes ranks tK … (t+1)K − 1, so that the masks of tasks do not overlap."""

    def choose(context: InitContext) -> Tensor:
        weight = context.weight()
        order = torch.sort(weight.abs().flatten(), descending=True, stable=True).indices
        return _positions(order[task * count : (task + 1) * count], weight.shape[1])

    return MaskMaker(lambda site: count, choose)


def random_mask(count: int) -> MaskMaker:
    """Choose ``count`` positions uniformly (Rand)."""

    def choose(context: InitContext) -> Tensor:
        size = context.site.out_features * context.site.in_features
        return _positions(torch.randperm(size, generator=context.generator)[:count], context.site.in_features)

    return MaskMaker(lambda site: count, choose)


def gradient_mask(gradients: Mapping[str, Tensor], count: Callable[[Site], int]) -> MaskMaker:
    """Choose the largest |g| (Grad); ``gradients`` maps site paths to dL/dW (out, in) over a calibration set."""
    return MaskMaker(count, lambda context: top_entries(gradients[context.site.path].abs(), count(context.site)))


def snip_mask(gradients: Mapping[str, Tensor], count: Callable[[Site], int]) -> MaskMaker:
    """Choose the largest |W·g| (SNIP)."""

    def choose(context: InitContext) -> Tensor:
        scores = (context.weight() * gradients[context.site.path]).abs()
        return top_entries(scores, count(context.site))

    return MaskMaker(count, choose)


def struct_mask(every: int, offset: int = 0) -> MaskMaker:
    """Choose every ``every``-th row from ``offset``, and the main diagonal (Struct)."""

    def mask(site: Site) -> Tensor:
        chosen = torch.eye(site.out_features, site.in_features, dtype=torch.bool)
        chosen[offset::every] = True
        return chosen

    return MaskMaker(lambda site: int(mask(site).sum()), lambda context: mask(context.site).nonzero().t().contiguous())


def find_mask_maker(mask: str | MaskMaker, count: int) -> MaskMaker:
    """Return the mask maker called by a name, or the maker itself if one is given."""
    if isinstance(mask, MaskMaker):
        return mask
    named = {"random": random_mask, "magnitude": magnitude_mask}
    if mask not in named:
        raise OptionError(
            f"SHiRA has no mask named '{mask}'",
            nearest=nearest_name(mask, named),
            next_step="gradient_mask, snip_mask and struct_mask take their own arguments: pass what they return",
        )
    return named[mask](count)


def _positions(flat: Tensor, columns: int) -> Tensor:
    flat = flat.sort().values
    return torch.stack([flat // columns, flat % columns])
