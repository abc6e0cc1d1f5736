"""SCE: select entries that differ, weigh changes by their size, erase the minority sign."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lorac.argument_types import Rate
from lorac.merging.pruning import keep_largest
from lorac.merging.way import CombiningWay


@dataclass(frozen=True, kw_only=True)
class SCE(CombiningWay):
    """The mean of wᵢ·Δᵢ that have the sign of their sum, weighed by each one's mean square.

    Attributes:
        select_topk: the part of the entries, those with the largest variance over the adapters, that is kept.
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
