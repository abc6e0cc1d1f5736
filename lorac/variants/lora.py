"""LoRA, with rsLoRA's scaling.

Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.
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
from lorac.variants.base import MATRIX_KINDS, WeightVariant
from lorac.variants.params import ParamSpec


@dataclass(frozen=True, kw_only=True)
class LoRA(WeightVariant):
    """``W' = W + s·B·A`` and ``b' = b + s·β``, with s = alpha/r, or alpha/√r under rsLoRA.

    Attributes:
        r: rank.
        alpha: PEFT's lora_alpha.
        dropout: rate of the dropout on the branch's input, in training.
        rslora: PEFT's use_rslora.
        lora_bias: B carries a bias β (out,).
        rank_pattern, alpha_pattern: module pattern -> its own r or alpha.
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    rslora: bool = False
    lora_bias: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
    kinds: ClassVar[frozenset[SiteKind]] = MATRIX_KINDS | {SiteKind.MATRIX}
    dropout_place: ClassVar[Dropout] = Dropout.INPUT
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        # An embedding starts from A = 0, B ~ N(0, 1): the lookup of A is what training moves first (PEFT).
        embedding = site.kind is SiteKind.EMBEDDING
        first, second = (_inits.zeros, _inits.normal(1.0)) if embedding else (_inits.kaiming_uniform, _inits.zeros)
        specs = {
            "lora_A": ParamSpec((self.r, site.in_features), first),
            "lora_B": ParamSpec((site.out_features, self.r), second),
        }
        if self.lora_bias:
            specs["lora_bias"] = ParamSpec((site.out_features,), _inits.zeros)
        return specs

    def weight(self, W: torch.Tensor, p: Params) -> torch.Tensor:
        return W + self.scale * (p.lora_B @ p.lora_A)

    def new_bias(self, b: torch.Tensor, p: Params) -> torch.Tensor:
        return b + self.scale * p.lora_bias if self.lora_bias else b
