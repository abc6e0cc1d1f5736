"""Magnitude pruning: the weighted sum of each change's largest entries."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorac.merging.pruning import keep_largest
from lorac.merging.way import PrunedSumWay

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class MagnitudePrune(PrunedSumWay):
    """The sum of the largest entries."""

    name = "magnitude_prune"
    paper = "PEFT's add_weighted_adapter"

    def mask(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        return keep_largest(tensor, density)
