"""KaSA: low-rank factors with singular values between them, in place of the smallest components of the weight.

Wang et al. 2024, arXiv 2412.06071; layout and start values as in PEFT's LORA with kasa_config.
"""

from dataclasses import dataclass

import torch

from lorac.variants._layer_sizes import require_at_most
from lorac.variants.base import InitContext, Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import normal
from lorac.variants.low_rank import RankStabilizedFields, factor_specs


def smallest_components(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return A₀ (r, in) and B₀ (out, r) of the r smallest singular values of W (out, in), B₀·A₀."""
    u, s, vh = torch.linalg.svd(W, full_matrices=False)
    return vh[-r:].contiguous(), u[:, -r:] * s[-r:]


@dataclass(frozen=True, kw_only=True)
class KaSA(RankStabilizedFields, WeightVariant):
    """``W' = W − B₀·A₀ + s·B·diag(σ)·A``, B₀·A₀ the r smallest singular components of W, frozen, and s as for LoRA.

    PEFT takes the components out of the base for good; of a base that has lost them they are zero.
    """

    name = "kasa"
    paper = "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, arXiv 2412.06071"
    kinds = frozenset({SiteKind.LINEAR})
    identity_at_init = False

    def check(self, site: Site) -> None:
        super().check(site)
        require_at_most(site, "r", self.r, min(site.in_features, site.out_features) - 1)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        def smallest(index: int, shape: tuple[int, int]) -> ParamSpec:
            def draw(context: InitContext) -> Tensor:
                return smallest_components(context.weight(), self.r)[index]

            return ParamSpec(shape, draw, Role.FROZEN)

        return {
            **factor_specs(site, self.r),
            "lora_diag": ParamSpec((self.r,), normal(1.0), decay=False),
            "start_A": smallest(0, (self.r, site.in_features)),
            "start_B": smallest(1, (site.out_features, self.r)),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W - p.start_B @ p.start_A + self.scale * ((p.lora_B * p.lora_diag) @ p.lora_A)
