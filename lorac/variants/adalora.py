"""AdaLoRA: low-rank factors with singular values between them, of which training keeps the important ones.

Zhang et al. 2023, arXiv 2303.10512; shapes, initialisation and scale as in PEFT's ADALORA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
class AdaLoRA(WeightVariant):
    """``W' = W + s·B·diag(E)·A`` with s = alpha/(r + 1e-5), whatever rank a site is left with.

    Attributes:
        r: rank that every site starts with; PEFT's init_r.
        alpha: PEFT's lora_alpha.
        dropout: rate of the dropout on the branch's input, in training.
        rank_pattern: module path -> which of its r singular values are left, of the modules that lost some; a module's
            tensors hold those alone.
    """

    r: int = 12
    alpha: float = 8
    dropout: float = 0.0
    rank_pattern: Mapping[str, Sequence[bool]] = field(default_factory=dict)

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512"
    dropout_place: ClassVar[Dropout] = Dropout.INPUT

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rank_pattern", {path: tuple(marks) for path, marks in self.rank_pattern.items()})

    @property
    def scale(self) -> float:
        """s."""
        return self.alpha / (self.r + 1e-5)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        marks = self.rank_pattern.get(site.path)
        rank = self.r if marks is None else sum(marks)
        return {
            "lora_A": ParamSpec((rank, site.in_features), _inits.normal(0.02)),
            "lora_E": ParamSpec((rank, 1), _inits.zeros),
            "lora_B": ParamSpec((site.out_features, rank), _inits.normal(0.02)),
        }

    def weight(self, W: torch.Tensor, p: Params) -> torch.Tensor:
        return W + self.scale * (p.lora_B @ (p.lora_E * p.lora_A))
