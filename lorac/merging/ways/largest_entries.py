"""The largest entries of each change, summed (magnitude pruning) or with an elected sign (TIES)."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Self

import torch
from torch import Tensor

from lorac.argument_types import OneOf
from lorac.merging.pruning import keep_largest, largest_threshold, per_adapter
from lorac.merging.spaces import SPACES
from lorac.merging.terms import SiteTerms
from lorac.merging.way import PrunedSumWay, PruningWay, SignElectionWay


@dataclass(frozen=True, kw_only=True)
class LargestEntriesWay(PruningWay):
    """A way that keeps the largest entries by size.

    Attributes:
        scope: of what ``density`` is a part: of the entries of each ``site``, as in mergekit and PEFT, or of the whole
            ``adapter``, as in the paper of TIES and in KnOTS; that takes two passes, and memory for all sizes.
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


@dataclass(frozen=True, kw_only=True)
class MagnitudePrune(LargestEntriesWay, PrunedSumWay):
    """The sum of the largest entries."""

    name = "magnitude_prune"
    paper = "PEFT's add_weighted_adapter"


@dataclass(frozen=True, kw_only=True)
class Ties(LargestEntriesWay, SignElectionWay):
    """The mean of the largest entries that have the elected sign."""

    name = "ties"
    paper = "TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708"
    normalizes = True
