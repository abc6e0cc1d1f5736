"""Learned concatenation: existing LoRAs side by side, with a learned weight for each in every layer.

"LoRA Soups: Merging LoRAs for Practical Skill Composition Tasks", Prabhakar et al. 2024, arXiv 2410.13025.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorac.argument_types import Count
from lorac.variants._mixtures import LoraMixture
from lorac.variants.adapter import Adapter
from lorac.variants.base import Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import ones
from lorac.variants.low_rank import factor_specs


@dataclass(frozen=True, kw_only=True)
class LearnedCat(LoraMixture, WeightVariant):
    """``W' = W + Σ_i w_i·B_i·A_i``, w (experts,) learned at each site.

    A (experts·r, in) and B (out, experts·r) are the LoRAs' stacked factors; each LoRA's scale is in its B.

    Attributes:
        r: rank of each LoRA.
        experts: number of LoRAs.
        train_experts: whether A and B are trained too.
    """

    r: Count = 8
    experts: Count = 2
    train_experts: bool = False

    name = "learned_cat"
    paper = "LoRA Soups: Merging LoRAs for Practical Skill Composition Tasks, arXiv 2410.13025"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        role = Role.TRAINABLE if self.train_experts else Role.FROZEN
        weights = ParamSpec((self.experts,), ones, decay=False)
        return factor_specs(site, self.experts * self.r, role) | {"weights": weights}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        weighted = p.lora_B.unflatten(1, (self.experts, self.r)) * p.weights.unsqueeze(-1)
        return W + weighted.flatten(1) @ p.lora_A

    @classmethod
    def from_loras(  # type: ignore[override]  # no field is called weights
        cls, adapters: Sequence[Adapter], *, weights: Sequence[float] | None = None, **settings: Any
    ) -> Adapter:
        """Make one adapter from several LoRAs, in their order, with weights that still have to be trained.

        Args:
            weights: start values of each site's weights; default: 1 each. Other arguments are as in ``LoraMixture``.
        """
        made = super().from_loras(adapters, **settings)
        for tensors in made.tensors.values() if weights is not None else ():
            tensors["weights"] = tensors["weights"].new_tensor(weights)
        return made
