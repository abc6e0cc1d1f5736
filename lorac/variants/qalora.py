"""QA-LoRA: a LoRA on inputs pooled by groups, which a group-quantised base can absorb into its zero points.

Xu et al. 2023, arXiv 2309.14717; the scale is PEFT's.
"""

from dataclasses import dataclass

from lorac.argument_types import Count
from lorac.errors import SiteError
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import kaiming_uniform, zeros
from lorac.variants.low_rank import RankStabilizedFields


@dataclass(frozen=True, kw_only=True)
class QALoRA(RankStabilizedFields, WeightVariant):
    """``W' = W + s·(in/g²)·B·(A ⊗ 1ᵀ)``, A (r, in/g) and 1 of length g: A reads in/g times the means of g inputs each.

    Attributes:
        group_size: PEFT's qalora_group_size, g.
    """

    group_size: Count = 16

    name = "qalora"
    paper = "QA-LoRA: Quantization-Aware Low-Rank Adaptation of Large Language Models, arXiv 2309.14717"
    kinds = frozenset({SiteKind.LINEAR})

    def check(self, site: Site) -> None:
        super().check(site)
        if site.in_features % self.group_size:
            raise SiteError(
                f"group_size={self.group_size} does not divide the {site.in_features} inputs of '{site.path}'",
                next_step="give a group_size= that divides them, or add the module to exclude=",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            "lora_A": ParamSpec((self.r, site.in_features // self.group_size), kaiming_uniform),
            "lora_B": ParamSpec((site.out_features, self.r), zeros),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        down = p.lora_A.repeat_interleave(self.group_size, dim=1)
        return W + self.scale * p.lora_A.shape[1] / self.group_size * (p.lora_B @ down)
