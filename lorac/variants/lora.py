"""LoRA, with rsLoRA's scaling, and activated LoRA.

Hu et al. 2021, arXiv 2106.09685; rsLoRA: Kalajdzievski 2023, arXiv 2312.03732; aLoRA: Greenewald et al. 2025, arXiv
2504.12397.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lorac.errors import SiteError
from lorac.variants.base import MATRIX_KINDS, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import zeros
from lorac.variants.low_rank import RankStabilizedFields, peft_factor_specs


@dataclass(frozen=True, kw_only=True)
class LoRA(RankStabilizedFields, WeightVariant):
    """``W' = W + s·B·A`` and ``b' = b + s·β``, with s = alpha/r, or alpha/√r under rsLoRA.

    Attributes:
        lora_bias: whether B has a bias β (out,).
        invocation_tokens: PEFT's alora_invocation_tokens: the change acts from the last occurrence of these token ids
            in a prompt on, and not at all in a prompt without them; empty: it acts on every token.
    """

    lora_bias: bool = False
    invocation_tokens: Sequence[int] = ()

    name = "lora"
    paper = "LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
    kinds = MATRIX_KINDS | {SiteKind.MATRIX}

    def params(self, site: Site) -> dict[str, ParamSpec]:
        specs = peft_factor_specs(site, self.r)
        return specs | ({"lora_bias": ParamSpec((site.out_features,), zeros)} if self.lora_bias else {})

    def check(self, site: Site) -> None:
        super().check(site)
        if self.invocation_tokens and (site.kind is not SiteKind.LINEAR or site.within is not None):
            what = f"a LoRA with invocation_tokens adapts only linear layers, and '{site.path}' is not linear"
            raise SiteError(what, next_step="narrow targets=, or add the module to exclude=")

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + self.scale * (p.lora_B @ p.lora_A)

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        return b + self.scale * p.lora_bias if self.lora_bias else b
