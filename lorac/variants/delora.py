"""DeLoRA: a low-rank change whose strength is bounded and separate from its direction.

Bini et al. 2025, arXiv 2503.18225; layout and start values as in PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.argument_types import Count
from lorac.variants.base import Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import constant
from lorac.variants.low_rank import InputDropout, peft_factor_specs

_LEAST_NORM = 1e-4


@dataclass(frozen=True, kw_only=True)
class DeLoRA(InputDropout, WeightVariant):
    """``W' = W + λ/r·Σᵢ bᵢ·aᵢᵀ/(‖bᵢ‖·‖aᵢ‖)∘n``, with the columns bᵢ of B (out, r) and the rows aᵢ of A (r, in).

    n (in,) are the norms of W's columns when the adapter was made. Norms of bᵢ and aᵢ are clamped to at least 1e-4.

    Attributes:
        r: rank.
        delora_lambda: start value of λ (1,), the bound of the strength.
        rank_pattern: module pattern -> r of these modules.
        lambda_pattern: module pattern -> delora_lambda of these modules.
    """

    r: Count = 8
    delora_lambda: float = 15
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    lambda_pattern: Mapping[str, float] = field(default_factory=dict)

    name = "delora"
    paper = "Decoupling Angles and Strength in Low-rank Adaptation, arXiv 2503.18225"
    kinds = frozenset({SiteKind.LINEAR})
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "lambda_pattern": "delora_lambda"}

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            **peft_factor_specs(site, self.r, "delora"),
            "delora_lambda": ParamSpec((1,), constant(self.delora_lambda), decay=False),
            "delora_w_norm": ParamSpec(
                (site.in_features,), lambda context: torch.linalg.vector_norm(context.weight(), dim=0), Role.FROZEN
            ),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        norms = (torch.linalg.vector_norm(factor, dim=dim) for factor, dim in ((p.delora_A, 1), (p.delora_B, 0)))
        of_a, of_b = (norm.clamp_min(_LEAST_NORM) for norm in norms)
        up = p.delora_B * (p.delora_lambda / (self.r * of_a * of_b))
        return W + up @ (p.delora_A * p.delora_w_norm)
