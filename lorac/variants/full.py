"""Full fine-tuning of chosen weights, as an adapter: a weight of its own in the place of the base's.

What optimizers for whole weights train (``lorac.training.GaLoreAdamW``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site
from lorac.variants.base import WeightVariant
from lorac.variants.params import InitContext, ParamSpec


def _base_weight(context: InitContext) -> torch.Tensor:
    return context.weight().clone()


@dataclass(frozen=True, kw_only=True)
class Full(WeightVariant):
    """``W' = weight``, which starts as W: (out, in), kernels flattened. ``bias="all"`` trains the biases, too.

    The base stays as it is, so that the result is swapped and mixed as any adapter; it takes as much memory as W.
    """

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "full fine-tuning"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"weight": ParamSpec((site.out_features, site.in_features), _base_weight)}

    def weight(self, W: torch.Tensor, p: Params) -> torch.Tensor:
        return p.weight
