"""LoRA-Composer's constraints: losses that move a latent until attention lies in boxes, and the first latent.

Maps have leading axes of their own, such as the rows of a batch. Sizes are those of the maps' grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ENHANCE, FILL, PERCEPTION, SHARE, RATE = 8.0, 2.0, 10.0, 0.2, 20.0
"""Weights of the terms, the share of a box's cells that the top-k means take, and the rate of the first update."""


def update_rate(step: int, steps: int, rate: float = RATE) -> float:
    """Return the rate of the update at one of all steps: ``rate``·√s, with s from 1 to ½."""
    return float(rate * (1 - 0.5 * step / max(steps - 1, 1)) ** 0.5)


def concept_loss(maps: Tensor, mask: Tensor, *, smooths: bool = True) -> Tensor:
    """Return the loss of attention to some words that is missing inside a box.

    Args:
        maps: attention of each pixel to each word (…, height, width, words).
        mask: the box (height, width), booleans.
        smooths: apply a 3 x 3 Gaussian first.

    Returns:
        (…,), summed over words: 8·max(0, 1 − mean of the largest values under a bell in the box), and twice the L1
        distance of the maxima of rows and of columns from those of the box.
    """
    maps = maps.movedim(-1, -3)  # (…, words, height, width)
    if smooths:  # by exp(−x²), the edges reflected: the authors' σ = ½ is √½ in fact
        side = torch.exp(-torch.tensor([1.0, 0.0, 1.0], dtype=maps.dtype, device=maps.device))
        kernel = torch.outer(side, side) / side.sum().square()
        flat = F.pad(maps.reshape(-1, 1, *maps.shape[-2:]), (1, 1, 1, 1), mode="reflect")
        maps = F.conv2d(flat, kernel[None, None]).reshape(maps.shape)
    inside, box = maps * mask, mask.to(maps.dtype)
    peak = _top_mean((maps * bell(mask)).flatten(-2), mask)
    fill = sum((inside.amax(axis) - box.amax(axis)).abs().mean(-1) for axis in (-1, -2))
    return (ENHANCE * (1 - peak).clamp(min=0) + FILL * fill).sum(-1)


def leak_loss(maps: Tensor, mask: Tensor) -> Tensor:
    """Return ten times the mean of the largest self-attention (…, pixels, pixels) out of a box (height, width)."""
    inside = mask.flatten()
    if bool(inside.all()):
        return maps.new_zeros(maps.shape[:-2])
    return PERCEPTION * _top_mean(maps[..., inside, :][..., ~inside].flatten(-2), mask)


def bell(mask: Tensor) -> Tensor:
    """Return exp(−(x² + y²)/2) with x and y from −1 to 1 over a box, its largest value 1; zero outside the box."""
    rows, columns = mask.any(1), mask.any(0)
    sides = [torch.linspace(-1, 1, int(side.sum()), device=mask.device) for side in (rows, columns)]
    inner = torch.exp(-(sides[0][:, None].square() + sides[1].square()) / 2)
    found = torch.zeros(mask.shape, device=mask.device)
    found[mask] = (inner / inner.max()).flatten() if inner.numel() else inner.flatten()
    return found


def begin_in_boxes(latents: Tensor, maps: Tensor, masks: Tensor) -> Tensor:
    """Return latents with the most likely beginning of each concept in its box.

    For each box, the window of its size with the most attention is copied into it; then the whole gets back the mean
    and the standard deviation of the latents.

    Args:
        latents: (b, channels, H, W).
        maps: attention to the words of each region (b, n, height, width); H and W are multiples of its sizes.
        masks: the boxes on that grid (n, height, width), booleans.
    """
    moved = latents.clone()
    for old, new, row in zip(latents, moved, maps, strict=True):
        for attention, mask in zip(row, masks, strict=True):
            # Copy the window with the most attention into the box of the mask.
            stride, sides = old.shape[-1] // mask.shape[-1], (mask.any(1), mask.any(0))
            size = tuple(int(side.sum()) for side in sides)
            if 0 in size:
                continue
            sums = F.avg_pool2d(attention[None, None], size, stride=1)[0, 0]
            best = divmod(int(sums.argmax()), sums.shape[1])
            goal = tuple(int(side.int().argmax()) for side in sides)
            new[:, *_window(goal, size, stride)] = old[:, *_window(best, size, stride)]
    axes = tuple(range(1, latents.dim()))
    old_std, old_mean = torch.std_mean(latents, axes, keepdim=True)
    std, mean = torch.std_mean(moved, axes, keepdim=True)
    return (moved - mean) / std * old_std + old_mean


def _window(corner: Sequence[int], size: Sequence[int], stride: int) -> tuple[slice, ...]:
    """Return the cells of latents below a window of maps."""
    return tuple(slice(at * stride, (at + n) * stride) for at, n in zip(corner, size, strict=True))


def _top_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of the largest of some values (…, count): a fifth as many as a box has cells, or one."""
    count = min(max(int(SHARE * int(mask.sum())), 1), values.shape[-1])
    return values.topk(count).values.mean(-1)
