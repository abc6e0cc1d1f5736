"""Masks with which ways of merging prune the entries of a change."""

from collections.abc import Sequence
from typing import Annotated, TypeAlias

import torch
from torch import Tensor

from lorac.argument_types import Bounds
from lorac.errors import OptionError

Part: TypeAlias = Annotated[float | Sequence[float], Bounds(0, 1, exclusive=True)]
"""A share of the entries, above 0: for all adapters, or one per adapter."""
Share: TypeAlias = Annotated[float | Sequence[float], Bounds(0, 1)]
"""A share of the entries: for all adapters, or one per adapter."""


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Return a mask of the share ``density`` of entries that are largest by magnitude, at least one."""
    return _mask_largest(tensor, max(1, int(density * tensor.numel())))


def largest_threshold(sizes: Tensor, density: float) -> float:
    """Return the threshold that a share ``density`` of sizes (n,), and at least one, reaches."""
    count = max(1, int(density * sizes.numel()))
    return float(sizes.kthvalue(sizes.numel() - count + 1).values)


def drop_outliers(tensor: Tensor, density: float, gamma: float) -> Tensor:
    """Return a mask of the share ``density`` of the entries: the largest by magnitude, except the share ``gamma``.

    Fewer outliers are dropped if the density would not be reached otherwise.
    """
    kept = max(1, int(density * tensor.numel()))
    outliers = min(int(gamma * tensor.numel()), tensor.numel() - kept)
    return _mask_largest(tensor, kept + outliers) & ~_mask_largest(tensor, outliers)


def keep_at_random(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random mask that keeps each entry with its probability."""
    drawn = torch.bernoulli(probabilities.to(generator.device), generator=generator)
    return drawn.to(probabilities.device).bool()


def keep_by_rank(tensor: Tensor, density: float, epsilon: float, generator: torch.Generator) -> Tensor:
    """Return a random mask whose probabilities rise linearly with an entry's rank by magnitude in its row.

    A row's smallest entry has the probability density − ε, its largest density + ε.

    Raises:
        OptionError: density ± ε are not probabilities.
    """
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise OptionError(
            f"density ± epsilon, here {density:g} ± {epsilon:g}, is not between 0 and 1",
            next_step=f"give epsilon= a number below {min(density, 1 - density):g}, or density=1 to keep every entry",
        )
    ranks = tensor.abs().argsort(dim=-1, stable=True).argsort(dim=-1).to(tensor.dtype)
    step = 2 * epsilon / max(tensor.shape[-1] - 1, 1)
    return keep_at_random(density - epsilon + ranks * step, generator)


def match_norms(pruned: Tensor, whole: Tensor) -> Tensor:
    """Scale a pruned tensor to the sum of absolute values before pruning."""
    before, after = whole.abs().sum(), pruned.abs().sum()
    return pruned if after == 0 else pruned * (before / after)


def per_adapter(value: float | Sequence[float], count: int) -> list[float]:
    """Return an option as one value per adapter; a single value is repeated."""
    return [*value] if isinstance(value, Sequence) else [value] * count


def _mask_largest(tensor: Tensor, count: int) -> Tensor:
    """Return a mask of the largest entries by magnitude; of equal entries, the first."""
    if count <= 0:
        return torch.zeros_like(tensor, dtype=torch.bool)
    sizes = tensor.abs().flatten()
    threshold = sizes.kthvalue(sizes.numel() - count + 1).values
    above, equal = sizes > threshold, sizes == threshold
    room = count - int(above.sum())
    if int(equal.sum()) > room:
        equal &= equal.cumsum(0) <= room
    return (above | equal).view(tensor.shape)
