"""HiRA: a low-rank matrix that multiplies the weight entry by entry.

Huang et al., ICLR 2025, OpenReview TwJrTz9cRS (on no arXiv); names and initialisation as in PEFT's HIRA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.live_terms import Dropout
from lorac.variants import _initialisers as _inits
from lorac.variants.base import WeightVariant
from lorac.variants.params import ParamSpec


@dataclass(frozen=True, kw_only=True)
class HiRA(WeightVariant):
    """``W' = W∘(1 + B·A)``: proportional to W, so of high rank. There is no scale.

    Attributes:
        r: rank of B·A.
        dropout: rate of the dropout on the branch's input, in training.
        rank_pattern: module pattern -> its own r.
    """

    r: int = 32
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    name: ClassVar[str] = "hira"
    paper: ClassVar[str] = "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation, OpenReview TwJrTz9cRS"
    dropout_place: ClassVar[Dropout] = Dropout.INPUT
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}

    def params(self, site: Site) -> dict[str, ParamSpec]:
        # As LoRA's: an embedding moves its rows first.
        embedding = site.kind is SiteKind.EMBEDDING
        first, second = (_inits.zeros, _inits.normal(1.0)) if embedding else (_inits.kaiming_uniform, _inits.zeros)
        return {
            "hira_A": ParamSpec((self.r, site.in_features), first),
            "hira_B": ParamSpec((site.out_features, self.r), second),
        }

    def weight(self, W: torch.Tensor, p: Params) -> torch.Tensor:
        return W * (1 + p.hira_B @ p.hira_A)
