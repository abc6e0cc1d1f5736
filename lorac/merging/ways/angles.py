"""Means of changes that depend on the angles between them: on a sphere, or shortened by the angles."""

from typing import ClassVar

import torch
from torch import Tensor

from lorac.argument_types import Count, Positive, Rate
from lorac.errors import ChoiceError
from lorac.merging.way import SumWay

_PARALLEL = 0.9995
"""Cosine above which an arc is computed as a line."""


class Slerp(SumWay):
    """(sin((1 − t)·θ)·Δ₁ + sin(t·θ)·Δ₂) / sin θ, θ the angle between the changes; mergekit rotates whole weights.

    Attributes:
        t: 0 for the first adapter, 1 for the second; default: the second adapter's share of the weights.
    """

    t: Rate | None = None

    name = "slerp"
    paper = "Animating Rotation with Quaternion Curves, SIGGRAPH 1985"
    most: ClassVar[int | None] = 2

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        if len(weights) == 1:
            return weights
        t = weights[1] / weights.sum() if self.t is None else weights.new_tensor(self.t)
        line = torch.stack([1 - t, t])
        lengths = gram.diagonal().sqrt()
        if not lengths.all():
            return line
        cosine = gram[0, 1] / lengths.prod()
        if cosine.abs() > _PARALLEL:
            return line
        angle = cosine.arccos()
        return (line * angle).sin() / angle.sin()


class MultiSlerp(SumWay):
    """The mean of the changes' directions, taken in the sphere's tangent plane at it, times their mean length.

    Attributes:
        normalize_weights: whether to divide the weights by their sum.
    """

    normalize_weights: bool = True

    name = "multislerp"
    paper = "mergekit"

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        weights = weights / weights.sum() if self.normalize_weights else weights
        cosines, lengths = _normalise(gram)
        length = _measure(weights, cosines)
        if length == 0:
            raise ChoiceError(
                "the directions of the changes cancel, so that they have no mean", next_step="give others"
            )
        mean = weights / length
        tangent = weights - (weights @ cosines @ mean) * mean
        return _rescale(_move(mean, tangent, cosines), lengths, weights)


class Karcher(SumWay):
    """The direction with the least weighted sum of squared angles to the changes' directions, times their mean length.

    Attributes:
        max_iter: largest number of steps.
        tol: length of a step at which the iteration stops.
    """

    max_iter: Count = 10
    tol: Positive = 1e-5

    name = "karcher"
    paper = "Riemannian center of mass and mollifier smoothing, CPAM 1977"

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        cosines, lengths = _normalise(gram)
        present = (lengths > 0).to(weights)
        shares = weights * present / (weights * present).sum()
        point = shares / _measure(shares, cosines)
        for _ in range(self.max_iter):
            towards = (cosines @ point).clamp(-1, 1)
            pulls = shares / torch.sinc(towards.arccos() / torch.pi)
            tangent = pulls - (pulls @ towards) * point
            if _measure(tangent, cosines) < self.tol:
                break
            point = _move(point, tangent, cosines)
            point = point / _measure(point, cosines)
        return _rescale(point, lengths, shares)


class ModelStock(SumWay):
    """t·mean(wᵢ·Δᵢ) with t = N·c / (1 + (N − 1)·c), c the mean cosine of two changes."""

    name = "model_stock"
    paper = "Model Stock: All we need is just a few fine-tuned models, arXiv 2403.19522"

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        count = len(weights)
        if count == 1:
            return weights
        cosines = _normalise(gram)[0] * (weights.sign()[:, None] * weights.sign())
        mean = cosines.triu(1).sum() / (count * (count - 1) / 2)
        return weights * mean / (1 + (count - 1) * mean)


def _normalise(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inner products (N, N) of the directions, and the lengths (N,); a zero vector has no direction."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    safe = torch.where(lengths > 0, lengths, 1)
    return gram / (safe[:, None] * safe), lengths


def _measure(point: Tensor, cosines: Tensor) -> Tensor:
    """Return the length of Σ pointᵢ·uᵢ."""
    return (point @ cosines @ point).clamp_min(0).sqrt()


def _move(point: Tensor, tangent: Tensor, cosines: Tensor) -> Tensor:
    """Return the point that the geodesic from ``point`` along a tangent reaches, at the tangent's length."""
    length = _measure(tangent, cosines)
    return point * length.cos() + tangent * torch.sinc(length / torch.pi)


def _rescale(point: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    """Return the coefficients of the original vectors for a point, scaled to their mean length."""
    safe = torch.where(lengths > 0, lengths, 1)
    return point * (weights @ lengths) / safe
