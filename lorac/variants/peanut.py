"""PEANuT: a small network computes the update from the weight.

Zhong et al. 2024, arXiv 2410.01870; layers, residuals and start values as in PEFT's PEANUT.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from lorac.argument_types import Bounds, Count, OneOf
from lorac.variants._bottleneck_layers import ACTIVATIONS as PLAIN
from lorac.variants.base import Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.initialisers import kaiming_uniform, zeros

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    **{name: function for name, function in PLAIN.items() if name != "leakyrelu"},
    "leaky_relu": F.leaky_relu,
    "relu2": lambda x: torch.relu(x) ** 2,
}
"""transformers' names of activations -> the functions."""


@dataclass(frozen=True, kw_only=True)
class PEANuT(WeightVariant):
    """``W' = W + s·B·H`` with H (r, in) computed from W by layers without biases.

    H₀ = σ(A·W), Hᵢ = σ(Eᵢ·Hᵢ₋₁) for the encoders, then H ← σ(Dᵢ·H) + Hₙ₋ᵢ for the decoders, i from 1 to n = depth.

    Attributes:
        r: rank.
        depth: number of encoders, and of decoders.
        act_fn: σ by transformers' name.
        scaling: s.
    """

    r: Count = 32
    depth: Annotated[int, Bounds(0, 100)] = 0
    act_fn: Annotated[str, OneOf(ACTIVATIONS)] = "relu"
    scaling: float = 1.0

    name = "peanut"
    paper = "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers, arXiv 2410.01870"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        square = ParamSpec((self.depth, self.r, self.r), kaiming_uniform)
        return {
            "peanut_A": ParamSpec((self.r, site.out_features), kaiming_uniform),
            "peanut_B": ParamSpec((site.out_features, self.r), zeros),
            **(dict.fromkeys(("peanut_encoders", "peanut_decoders"), square) if self.depth else {}),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        act = ACTIVATIONS[self.act_fn]
        passed = [act(p.peanut_A @ W)]
        for layer in range(self.depth):
            passed.append(act(p.peanut_encoders[layer] @ passed[-1]))
        hidden = passed.pop()
        for layer in range(self.depth):
            hidden = act(p.peanut_decoders[layer] @ hidden) + passed.pop()
        return W + self.scaling * (p.peanut_B @ hidden)
