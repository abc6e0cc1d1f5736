"""DoRA: weight-decomposed low-rank adaptation.

Liu et al. 2024, arXiv 2402.09353; the norm is per output feature, as in the paper's code and PEFT.
"""

from __future__ import annotations

import math
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
class DoRA(WeightVariant):
    """``W' = (m/n) ∘ (W + s·B·A)`` with n the row norms (out,) of W + s·B·A, constant in the backward pass.

    Attributes:
        r, alpha, dropout, rslora, rank_pattern, alpha_pattern: as LoRA's.
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    name: ClassVar[str] = "dora"
    paper: ClassVar[str] = "DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353"
    dropout_place: ClassVar[Dropout] = Dropout.INPUT
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        embedding = site.kind is SiteKind.EMBEDDING
        first, second = (_inits.zeros, _inits.normal(1.0)) if embedding else (_inits.kaiming_uniform, _inits.zeros)
        return {
            "lora_A": ParamSpec((self.r, site.in_features), first),
            "lora_B": ParamSpec((site.out_features, self.r), second),
            "magnitude": ParamSpec((site.out_features,), _inits.row_norms),
        }

    def weight(self, W: torch.Tensor, p: Params) -> torch.Tensor:
        updated = W + self.scale * (p.lora_B @ p.lora_A)
        norm = torch.linalg.vector_norm(updated, dim=1).detach()
        return (p.magnitude / norm)[:, None] * updated
