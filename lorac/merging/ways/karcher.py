"""The Karcher mean of changes on a sphere."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.argument_types import Count, Positive
from lorac.merging.way import SumWay
from lorac.merging.ways._sphere import measure, move, normalise, rescale


@dataclass(frozen=True, kw_only=True)
class Karcher(SumWay):
    """The direction with the least weighted sum of squared angles to the changes' directions, times their mean length.

    Attributes:
        max_iter: largest number of steps.
        tol: length of the step after which no other follows.
    """

    max_iter: Count = 10
    tol: Positive = 1e-5

    name = "karcher"
    paper = "Riemannian center of mass and mollifier smoothing, CPAM 1977"

    def coefficients(self, gram: Tensor, weights: Tensor) -> Tensor:
        cosines, lengths = normalise(gram)
        present = (lengths > 0).to(weights)
        shares = weights * present / (weights * present).sum()
        point = shares / measure(shares, cosines)
        for _ in range(self.max_iter):
            towards = (cosines @ point).clamp(-1, 1)
            pulls = shares / torch.sinc(towards.arccos() / torch.pi)
            tangent = pulls - (pulls @ towards) * point
            if measure(tangent, cosines) < self.tol:
                break
            point = move(point, tangent, cosines)
            point = point / measure(point, cosines)
        return rescale(point, lengths, shares)
