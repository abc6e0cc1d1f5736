"""Points on a sphere as sums of unit vectors, known by their inner products alone."""

import torch
from torch import Tensor


def normalise(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inner products (N, N) of the directions, and the lengths (N,); a vector of length 0 has none."""
    lengths = gram.diagonal().clamp_min(0).sqrt()
    safe = torch.where(lengths > 0, lengths, 1)
    return gram / (safe[:, None] * safe), lengths


def measure(point: Tensor, cosines: Tensor) -> Tensor:
    """Return the length of Σ pointᵢ·uᵢ."""
    return (point @ cosines @ point).clamp_min(0).sqrt()


def move(point: Tensor, tangent: Tensor, cosines: Tensor) -> Tensor:
    """Return the point that a geodesic reaches from another along a tangent, after the tangent's length."""
    length = measure(tangent, cosines)
    return point * length.cos() + tangent * torch.sinc(length / torch.pi)


def rescale(point: Tensor, lengths: Tensor, weights: Tensor) -> Tensor:
    """Return the coefficients of the vectors themselves for a point of their mean length."""
    safe = torch.where(lengths > 0, lengths, 1)
    return point * (weights @ lengths) / safe
