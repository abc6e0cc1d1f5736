"""Spherical interpolation between two changes."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lorac.argument_types import Rate
from lorac.merging.way import SumWay

_PARALLEL = 0.9995
"""Cosine above which the arc is taken for a line."""


@dataclass(frozen=True, kw_only=True)
class Slerp(SumWay):
    """(sin((1 − t)·θ)·Δ₁ + sin(t·θ)·Δ₂) / sin θ, θ the angle between the two changes; mergekit turns whole weights.

    Attributes:
        t: 0 for the first adapter, 1 for the second; default: the second's part of the weights.
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
