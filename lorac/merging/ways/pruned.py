"""Ways that prune entries of each change, and sum the rest or elect a sign.

They keep the largest entries (magnitude pruning, TIES), random entries (DARE), random entries with larger entries more
likely (DELLA), all except the smallest and the outliers (Model Breadcrumbs), or the entries that vary most over the
adapters (SCE).
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Annotated, Self

import torch
from torch import Tensor

from lorac.argument_types import OneOf, Rate
from lorac.merging.pruning import (
    Share,
    drop_outliers,
    keep_at_random,
    keep_by_rank,
    keep_largest,
    largest_threshold,
    per_adapter,
)
from lorac.merging.spaces import SPACES
from lorac.merging.terms import SiteTerms
from lorac.merging.way import CombiningWay, PrunedSumWay, PruningWay, SignElectionWay


class LargestEntriesWay(PruningWay):
    """A way that keeps the largest entries by magnitude.

    Attributes:
        scope: ``density`` is a share of the entries of each ``site``, as in mergekit and PEFT, or of the whole
            ``adapter``, as in the paper of TIES and in KnOTS, which takes two passes, and memory for all magnitudes.
    """

    scope: Annotated[str, OneOf(("site", "adapter"))] = "site"
    thresholds: Sequence[float] = field(default=(), init=False, repr=False)

    def survey(self, terms: Iterable[SiteTerms]) -> Self:
        if self.scope == "site":
            return self
        sizes: list[Tensor] = []

        def collect(tensors: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
            sizes.append(tensors.abs().flatten(1))
            return tensors[0]

        for one in terms:
            SPACES[self.space](collect, one)
        whole = torch.cat(sizes, dim=1)
        densities = per_adapter(self.density, len(whole))
        surveyed = copy.copy(self)
        found = tuple(largest_threshold(row, density) for row, density in zip(whole, densities, strict=True))
        object.__setattr__(surveyed, "thresholds", found)
        return surveyed

    def mask(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        return tensor.abs() >= self.thresholds[index] if self.thresholds else keep_largest(tensor, density)


class MagnitudePrune(LargestEntriesWay, PrunedSumWay):
    """The sum of the largest entries."""

    name = "magnitude_prune"
    paper = "PEFT's add_weighted_adapter"


class Ties(LargestEntriesWay, SignElectionWay):
    """The mean of the largest entries that have the elected sign."""

    name = "ties"
    paper = "TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708"
    normalizes = True


class RandomPruningWay(PruningWay):
    """A way that keeps entries at random."""

    paper = (
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, arXiv 2311.03099"
    )
    rescales = True

    def mask(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        return keep_at_random(torch.full_like(tensor, density), generator)


class DareLinear(RandomPruningWay, PrunedSumWay):
    """The sum of random entries, scaled up to the size of the whole; the paper's p is 1 − density."""

    name = "dare_linear"


class DareTies(RandomPruningWay, SignElectionWay):
    """The sum of random entries with the elected sign, scaled up to the whole's size; the paper's p is 1 − density."""

    name = "dare_ties"


class RankPruningWay(PruningWay):
    """A way that draws entries with a probability that rises with their rank by magnitude in the row.

    Attributes:
        epsilon: the probability of an entry rises from density − ε for a row's smallest to density + ε for its largest;
            one number for all adapters, or one per adapter.
    """

    epsilon: Share = 0.15

    paper = "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling, arXiv 2406.11617"
    rescales = True

    def mask(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        return keep_by_rank(tensor, density, per_adapter(self.epsilon, index + 1)[index], generator)


class DellaLinear(RankPruningWay, PrunedSumWay):
    """The sum of entries drawn by their rank by magnitude in the row."""

    name = "della_linear"


class Della(RankPruningWay, SignElectionWay):
    """The sum of entries drawn by their rank by magnitude in the row, and with the elected sign."""

    name = "della"
    normalizes = True


class OutlierPruningWay(PruningWay):
    """A way that prunes the smallest entries of each change, and the very largest.

    Attributes:
        gamma: the share of the entries that are outliers: for all adapters, or one per adapter.
    """

    gamma: Share = 0.01

    paper = "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, arXiv 2312.06795"

    def mask(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        return drop_outliers(tensor, density, per_adapter(self.gamma, index + 1)[index])


class Breadcrumbs(OutlierPruningWay, PrunedSumWay):
    """The sum of each change's entries except the smallest and the very largest."""

    name = "breadcrumbs"


class BreadcrumbsTies(OutlierPruningWay, SignElectionWay):
    """The sum of entries with the elected sign, except the smallest and the very largest."""

    name = "breadcrumbs_ties"


class SCE(CombiningWay):
    """The mean of the wᵢ·Δᵢ that have the sign of their sum, weighted by the mean square of each.

    Attributes:
        select_topk: the share of the entries that is kept, those with the largest variance over the adapters.
    """

    select_topk: Rate = 1.0

    name = "sce"
    paper = "FuseChat: Knowledge Fusion of Chat Models, arXiv 2408.07990"

    @property
    def keeps_one(self) -> bool:
        return super().keeps_one and self.select_topk == 1

    def combine(self, tensors: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
        column = weights.view(-1, *[1] * (tensors.dim() - 1))
        changes = tensors * column
        if self.select_topk < 1:
            changes = changes * keep_largest(changes.var(0, correction=0), self.select_topk)
        shares = changes.flatten(1).square().mean(1).view_as(column)
        agreeing = changes.sign() == torch.where(changes.sum(0) >= 0, 1.0, -1.0)
        divisor = (shares * agreeing).sum(0)
        return (shares * changes * agreeing).sum(0) / torch.where(divisor == 0, 1.0, divisor)
