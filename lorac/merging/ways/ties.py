"""TIES: trim, elect a sign, and average what has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorac.merging.pruning import keep_largest
from lorac.merging.way import SignElectionWay

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Ties(SignElectionWay):
    """The mean of the largest entries that have the elected sign."""

    name = "ties"
    paper = "TIES-Merging: Resolving Interference When Merging Models, arXiv 2306.01708"
    normalizes = True

    def mask(self, tensor: Tensor, density: float, index: int, generator: torch.Generator) -> Tensor:
        return keep_largest(tensor, density)
