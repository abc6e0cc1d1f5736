"""SoRA: LoRA with a gate per rank, which training may close.

Ding et al., EMNLP 2023, arXiv 2311.11696.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site
from lorac.ir.slots.live_terms import Dropout
from lorac.variants import _initialisers as _inits
from lorac.variants.base import WeightVariant
from lorac.variants.params import ParamSpec


@dataclass(frozen=True, kw_only=True)
class SoRA(WeightVariant):
    """``W' = W + (alpha/r)·B·diag(g)·A``; the scale keeps the r it began with, however many gates g (r,) are 0.

    Attributes:
        r: largest rank, the paper's r_max.
        alpha: as LoRA's.
        dropout: rate of the dropout on the branch's input, in training.
        rank_pattern, alpha_pattern: module pattern -> its own r or alpha.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    name: ClassVar[str] = "sora"
    paper: ClassVar[str] = "Sparse Low-rank Adaptation of Pre-trained Language Models, arXiv 2311.11696"
    dropout_place: ClassVar[Dropout] = Dropout.INPUT
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((self.r, site.in_features), _inits.kaiming_uniform),
            "lora_B": ParamSpec((site.out_features, self.r), _inits.zeros),
            "gate": ParamSpec((self.r,), _inits.normal(1.0), decay=False),
        }

    def weight(self, W: torch.Tensor, p: Params) -> torch.Tensor:
        return W + self.alpha / self.r * ((p.lora_B * p.gate) @ p.lora_A)
