"""DARE: drop entries at random and rescale the others, summed or with an elected sign."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.merging.pruning import keep_at_random
from lorac.merging.way import PrunedSumWay, PruningWay, SignElectionWay


@dataclass(frozen=True, kw_only=True)
class RandomPruningWay(PruningWay):
    """A way that keeps entries at random."""

    paper = (
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, arXiv 2311.03099"
    )
    rescales = True

    def mask(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        return keep_at_random(torch.full_like(tensor, density), generator)


@dataclass(frozen=True, kw_only=True)
class DareLinear(RandomPruningWay, PrunedSumWay):
    """The sum of random entries, scaled up to the size of the whole; the paper's p is 1 − density."""

    name = "dare_linear"


@dataclass(frozen=True, kw_only=True)
class DareTies(RandomPruningWay, SignElectionWay):
    """The sum of random entries with the elected sign, scaled up to the whole's size; the paper's p is 1 − density."""

    name = "dare_ties"
