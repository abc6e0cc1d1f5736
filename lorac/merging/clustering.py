"""Weighted k-means, whose result does not depend on the order of the points."""

import torch
from torch import Tensor


def cluster(points: Tensor, weights: Tensor, k: int, generator: torch.Generator, tries: int, steps: int) -> Tensor:
    """Return the cluster of each point, from 0 to k − 1; of several tries, the one with the least Σ w·‖u − μ‖².

    The initial centres are drawn far from each other (Arthur and Vassilvitskii 2007, k-means++). Then each centre moves
    to the mean of its points until no point changes its cluster (Lloyd 1982).

    Args:
        points: (M, d), in the order of ``sort_points``.
        weights: (M,), above 0.
        k: the number of clusters, at most M.
        generator: source of the random initial centres.
        tries: the number of sets of initial centres.
        steps: the largest number of moves.
    """
    if k >= len(points):
        return torch.arange(len(points))
    found: list[tuple[float, Tensor]] = []
    for _ in range(tries):
        chosen = [int(torch.multinomial(weights, 1, generator=generator))]
        distances = _distances(points, points[chosen])[:, 0]
        while len(chosen) < k:
            chances = weights * distances
            chosen.append(int(torch.multinomial(chances if chances.any() else weights, 1, generator=generator)))
            distances = torch.minimum(distances, _distances(points, points[chosen[-1:]])[:, 0])
        labels, nearest = _assign(points, points[chosen])
        for _ in range(steps):
            centres = average(points, weights, labels, k)
            for empty in (_count(weights, labels, k) == 0).nonzero().flatten().tolist():
                centres[empty] = points[int((weights * nearest).argmax())]
                nearest = torch.minimum(nearest, _distances(points, centres[empty : empty + 1])[:, 0])
            before, (labels, nearest) = labels, _assign(points, centres)
            if torch.equal(before, labels):
                break
        found.append((float((weights * nearest).sum()), labels))
    return min(found, key=lambda one: one[0])[1]


def sort_points(points: Tensor) -> Tensor:
    """Return the order (M,) that sorts points (M, d) by their coordinates."""
    _, places = torch.unique(points, dim=0, return_inverse=True)
    return places.argsort(stable=True)


def average(points: Tensor, weights: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the weighted mean (k, d) of the points of each cluster; 0 for an empty cluster."""
    total = points.new_zeros(k, points.shape[1]).index_add_(0, labels, points * weights[:, None])
    return total / _count(weights, labels, k)[:, None].clamp_min(torch.finfo(points.dtype).tiny)


def _count(weights: Tensor, labels: Tensor, k: int) -> Tensor:
    return weights.new_zeros(k).index_add_(0, labels, weights)


def _assign(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    distances, labels = _distances(points, centres).min(1)
    return labels, distances


def _distances(points: Tensor, centres: Tensor) -> Tensor:
    """Return the squared distances (M, k)."""
    return torch.cdist(points, centres, compute_mode="donot_use_mm_for_euclid_dist").square()
