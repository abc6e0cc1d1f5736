"""KaSA: low-rank factors with singular values between them replace the smallest components of the weight.

Wang et al. 2024, arXiv 2412.06071; layout and start values as in PEFT's LORA with kasa_config.
"""

from dataclasses import dataclass

from lorac.variants._decompositions import truncated_svd
from lorac.variants._layer_shapes import require_at_most
from lorac.variants.base import InitContext, Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import normal
from lorac.variants.low_rank import RankStabilizedFields, factor_specs


@dataclass(frozen=True, kw_only=True)
class KaSA(RankStabilizedFields, WeightVariant):
    """``W' = W − B₀·A₀ + s·B·diag(σ)·A``, B₀·A₀ the r smallest singular components of W, frozen, and s as for LoRA.

    PEFT removes the components from the base permanently; for a base without them they are zero.
    """

    name = "kasa"
    paper = "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models, arXiv 2412.06071"
    kinds = frozenset({SiteKind.LINEAR})
    identity_at_init = False

    def check(self, site: Site) -> None:
        super().check(site)
        require_at_most(site, "r", self.r, min(site.in_features, site.out_features) - 1)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        def smallest(context: InitContext) -> Tensor:
            W = context.weight()
            return truncated_svd(W, min(W.shape))[2][-self.r :].contiguous()

        return {
            **factor_specs(site, self.r),
            "lora_diag": ParamSpec((self.r,), normal(1.0), decay=False),
            "start_A": ParamSpec((self.r, site.in_features), smallest, Role.FROZEN),
            # The rows of A₀ are orthonormal.
            "start_B": ParamSpec((site.out_features, self.r), lambda c: c.weight() @ c.params.start_A.t(), Role.FROZEN),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W - p.start_B @ p.start_A + self.scale * ((p.lora_B * p.lora_diag) @ p.lora_A)
