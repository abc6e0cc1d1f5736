"""Low-rank methods whose rank changes in training or after it.

AdaLoRA: Zhang et al. 2023, arXiv 2303.10512; shapes, initialisation and scale as in PEFT's ADALORA.
SoRA: Ding et al., EMNLP 2023, arXiv 2311.11696. DyLoRA: Valipour et al. 2022, arXiv 2210.07558.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorac.argument_types import Count
from lorac.variants.base import Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.initialisers import normal, zeros
from lorac.variants.low_rank import InputDropout, LowRankFields, factor_specs


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(InputDropout, WeightVariant):
    """``W' = W + s·B·diag(E)·A`` with s = alpha/(r + 1e-5), even at sites that lost some of their r ranks.

    Attributes:
        r: initial rank of every site; PEFT's init_r.
        alpha: PEFT's lora_alpha.
        rank_pattern: module path -> which of the module's r singular values remain, for modules that lost some; tensors
            have only these.
    """

    r: Count = 12
    alpha: float = 8
    rank_pattern: Mapping[str, Sequence[bool]] = field(default_factory=dict)

    name = "adalora"
    paper = "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning, arXiv 2303.10512"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rank_pattern", {path: tuple(marks) for path, marks in self.rank_pattern.items()})

    @property
    def scale(self) -> float:
        """The factor s of the change."""
        return self.alpha / (self.r + 1e-5)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        marks = self.rank_pattern.get(site.path)
        rank = self.r if marks is None else sum(marks)
        return {
            "lora_A": ParamSpec((rank, site.in_features), normal(0.02)),
            "lora_E": ParamSpec((rank, 1), zeros),
            "lora_B": ParamSpec((site.out_features, rank), normal(0.02)),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + self.scale * (p.lora_B @ (p.lora_E * p.lora_A))


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
