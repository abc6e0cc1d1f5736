"""LoRA, with rsLoRA's scaling.

Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732.
"""

from dataclasses import dataclass

from lorac.variants.base import MATRIX_KINDS, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import zeros
from lorac.variants.low_rank import RankStabilizedFields, peft_factor_specs


@dataclass(frozen=True, kw_only=True)
class LoRA(RankStabilizedFields, WeightVariant):
    """``W' = W + s·B·A`` and ``b' = b + s·β``, with s = alpha/r, or alpha/√r under rsLoRA.

    Attributes:
        lora_bias: B carries a bias β (out,).
    """

    lora_bias: bool = False

    name = "lora"
    paper = "LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
    kinds = MATRIX_KINDS | {SiteKind.MATRIX}

    def params(self, site: Site) -> dict[str, ParamSpec]:
        specs = peft_factor_specs(site, self.r)
        return specs | ({"lora_bias": ParamSpec((site.out_features,), zeros)} if self.lora_bias else {})

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + self.scale * (p.lora_B @ p.lora_A)

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        return b + self.scale * p.lora_bias if self.lora_bias else b
