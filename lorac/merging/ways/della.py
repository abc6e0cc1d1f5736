"""DELLA: drop entries at random, small ones sooner, summed or with an elected sign."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.merging.pruning import Share, keep_by_rank, per_adapter
from lorac.merging.way import PrunedSumWay, PruningWay, SignElectionWay


@dataclass(frozen=True, kw_only=True)
class RankPruningWay(PruningWay):
    """A way that draws entries by their rank in the row.

    Attributes:
        epsilon: the probability of an entry rises from density − ε for a row's smallest to density + ε for its largest;
            one number for all adapters, or one for each.
    """

    epsilon: Share = 0.15

    paper = "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling, arXiv 2406.11617"
    rescales = True

    def mask(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        return keep_by_rank(tensor, density, per_adapter(self.epsilon, index + 1)[index], generator)


@dataclass(frozen=True, kw_only=True)
class DellaLinear(RankPruningWay, PrunedSumWay):
    """The sum of entries that are drawn by their rank in the row."""

    name = "della_linear"


@dataclass(frozen=True, kw_only=True)
class Della(RankPruningWay, SignElectionWay):
    """The sum of entries that are drawn by their rank in the row, and have the elected sign."""

    name = "della"
    normalizes = True
