"""DoRA: weight-decomposed low-rank adaptation.

Liu et al. 2024, arXiv 2402.09353; the norm is per output feature, as in the paper's code and PEFT.
"""

from dataclasses import dataclass

from lorac.variants.base import Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.initialisers import row_norms
from lorac.variants.low_rank import RankStabilizedFields, peft_factor_specs, rescale_rows


@dataclass(frozen=True, kw_only=True)
class DoRA(RankStabilizedFields, WeightVariant):
    """``W' = (m/n) ∘ (W + s·B·A)`` with n the row norms (out,) of W + s·B·A, constant in the backward pass."""

    name = "dora"
    paper = "DoRA: Weight-Decomposed Low-Rank Adaptation, arXiv 2402.09353"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return peft_factor_specs(site, self.r) | {"magnitude": ParamSpec((site.out_features,), row_norms)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return rescale_rows(W + self.scale * (p.lora_B @ p.lora_A), p.magnitude)
