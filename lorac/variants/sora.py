"""SoRA: LoRA with a gate per rank, which training may close.

Ding et al., EMNLP 2023, arXiv 2311.11696.
"""

from dataclasses import dataclass

from lorac.variants.base import Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.initialisers import normal
from lorac.variants.low_rank import LowRankFields, factor_specs


@dataclass(frozen=True, kw_only=True)
class SoRA(LowRankFields, WeightVariant):
    """``W' = W + (alpha/r)·B·diag(g)·A``; the scale keeps the initial r, however many gates g (r,) become 0.

    Attributes:
        r: largest rank, the paper's r_max.
    """

    alpha: float = 16

    name = "sora"
    paper = "Sparse Low-rank Adaptation of Pre-trained Language Models, arXiv 2311.11696"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return factor_specs(site, self.r) | {"gate": ParamSpec((self.r,), normal(1.0), decay=False)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + self.scale * ((p.lora_B * p.gate) @ p.lora_A)
