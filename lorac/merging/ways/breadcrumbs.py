"""Model Breadcrumbs: leave the smallest entries and the outliers out, summed or with an elected sign."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.merging.pruning import Share, drop_outliers, per_adapter
from lorac.merging.way import PrunedSumWay, PruningWay, SignElectionWay


@dataclass(frozen=True, kw_only=True)
class OutlierPruningWay(PruningWay):
    """A way that leaves out the smallest entries of each change, and the very largest.

    Attributes:
        gamma: the part of the entries that are outliers, for all adapters or for each.
    """

    gamma: Share = 0.01

    paper = "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, arXiv 2312.06795"

    def mask(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        return drop_outliers(tensor, density, per_adapter(self.gamma, index + 1)[index])


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(OutlierPruningWay, PrunedSumWay):
    """The sum of each change's entries but the smallest and the very largest."""

    name = "breadcrumbs"


@dataclass(frozen=True, kw_only=True)
class BreadcrumbsTies(OutlierPruningWay, SignElectionWay):
    """The sum of entries that have the elected sign, without the smallest and the very largest."""

    name = "breadcrumbs_ties"
