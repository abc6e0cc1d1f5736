"""DyLoRA: a LoRA that can be truncated to any rank after training.

Valipour et al. 2022, arXiv 2210.07558.
"""

from dataclasses import dataclass

from lorac.variants.base import Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.low_rank import LowRankFields, factor_specs


@dataclass(frozen=True, kw_only=True)
class DyLoRA(LowRankFields, WeightVariant):
    """``W' = W + (alpha/b)·B[:, :b]·A[:b]`` at rank b, from 1 to r; ``Active(rank=b)`` chooses it, r is the default.

    Attributes:
        r: largest rank.
        alpha: the scale at rank b is alpha/b.
    """

    name = "dylora"
    paper = (
        "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation, "
        "arXiv 2210.07558"
    )
    truncatable = 1.0

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return factor_specs(site, self.r)

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + self.scale * (p.lora_B @ p.lora_A)
