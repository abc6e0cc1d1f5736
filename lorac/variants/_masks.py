"""The five masks of SHiRA (arXiv 2406.13175, section 3.2), which choose the trained positions of a weight."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from lorac.variants.base import InitContext, Site, Tensor


@dataclass(frozen=True)
class MaskMaker:
    """A function that chooses the positions of a mask.

    Attributes:
        make: function context -> (2, K) int64, row 0 the out index, row 1 the in index, in row-major order;
            ``context.shape`` is (2, K).
        entries: function site -> the number K of positions, for a mask that decides it; None: ``SHiRA`` decides it.
    """

    make: Callable[[InitContext], Tensor]
    entries: Callable[[Site], int] | None = None


def top_entries(scores: Tensor, count: int, skipped: int = 0) -> Tensor:
    """Return the positions (2, count) of the largest scores after the ``skipped`` largest; ties go to the lowest index.

    They are in row-major order.
    """
    order = torch.sort(scores.flatten(), descending=True, stable=True).indices
    return _positions(order[skipped : skipped + count], scores.shape[1])


def magnitude_mask(task: int = 0) -> MaskMaker:
    """Choose the largest |W| (WM); task t uses ranks tK … (t+1)K − 1, so that masks of tasks do not overlap."""
    return MaskMaker(lambda c: top_entries(c.weight().abs(), c.shape[1], task * c.shape[1]))


def random_mask() -> MaskMaker:
    """Choose positions uniformly (Rand)."""

    def choose(context: InitContext) -> Tensor:
        size = context.site.out_features * context.site.in_features
        order = torch.randperm(size, generator=context.generator)
        return _positions(order[: context.shape[1]], context.site.in_features)

    return MaskMaker(choose)


def gradient_mask(gradients: Mapping[str, Tensor]) -> MaskMaker:
    """Choose the largest |g| (Grad); ``gradients`` maps site paths to dL/dW (out, in) over a calibration set."""
    return MaskMaker(lambda c: top_entries(gradients[c.site.path].abs(), c.shape[1]))


def snip_mask(gradients: Mapping[str, Tensor]) -> MaskMaker:
    """Choose the largest |W·g| (SNIP)."""
    return MaskMaker(lambda c: top_entries((c.weight() * gradients[c.site.path]).abs(), c.shape[1]))


def struct_mask(every: int, offset: int = 0) -> MaskMaker:
    """Choose every ``every``-th row from ``offset`` on, and the main diagonal (Struct); the mask decides K."""

    def mask(site: Site) -> Tensor:
        chosen = torch.eye(site.out_features, site.in_features, dtype=torch.bool)
        chosen[offset::every] = True
        return chosen

    return MaskMaker(lambda context: mask(context.site).nonzero().t().contiguous(), lambda site: int(mask(site).sum()))


NAMED_MASKS: Mapping[str, MaskMaker] = {"random": random_mask(), "magnitude": magnitude_mask()}
"""Masks that need no arguments, by name."""


def _positions(flat: Tensor, columns: int) -> Tensor:
    flat = flat.sort().values
    return torch.stack([flat // columns, flat % columns])
