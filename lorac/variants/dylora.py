"""DyLoRA: one LoRA that may be cut to any rank after training.

Valipour et al. 2022, arXiv 2210.07558.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.errors import SiteError
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site
from lorac.ir.slots.live_terms import Dropout
from lorac.variants import _initialisers as _inits
from lorac.variants.base import WeightVariant
from lorac.variants.params import ParamSpec


@dataclass(frozen=True, kw_only=True)
class DyLoRA(WeightVariant):
    """``W' = W + (alpha/b)·B[:, :b]·A[:b]`` at rank b, from 1 to r; ``Active(rank=b)`` chooses it, r is the default.

    Attributes:
        r: largest rank.
        alpha: its scale at rank b is alpha/b.
        dropout: rate of the dropout on the branch's input, in training.
        rank_pattern, alpha_pattern: module pattern -> its own r or alpha.
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    name: ClassVar[str] = "dylora"
    paper: ClassVar[str] = (
        "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation, "
        "arXiv 2210.07558"
    )
    dropout_place: ClassVar[Dropout] = Dropout.INPUT
    truncatable: ClassVar[float | None] = 1.0
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def check(self, site: Site) -> None:
        super().check(site)
        out, columns = site.out_features, site.in_features
        if self.r * (out + columns) > out * columns:
            # It would be computed whole, and whole it has no ranks to cut.
            raise SiteError(
                f"DyLoRA's factors of rank {self.r} are larger than the weight of '{site.path}' ({columns} -> {out})",
                nearest=f"r={max(1, out * columns // (out + columns))}",
                next_step="give a smaller r, to this module alone by rank_pattern, or exclude= it",
                code="site_unsupported",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((self.r, site.in_features), _inits.kaiming_uniform),
            "lora_B": ParamSpec((site.out_features, self.r), _inits.zeros),
        }

    def weight(self, W: torch.Tensor, p: Params) -> torch.Tensor:
        return W + self.alpha / self.r * (p.lora_B @ p.lora_A)
