"""Arrow: existing LoRAs as experts in every layer; each token is routed to the LoRAs that stretch it most.

"Towards Modular LLMs by Building and Reusing a Library of LoRAs", Ostapenko et al. 2024, arXiv 2405.11157; PEFT's
``create_arrow_model``. Nothing is trained.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorac.argument_types import Count, Positive
from lorac.variants._mixtures import LoraMixture, RoutedVariant, top_k_softmax
from lorac.variants.base import Context, InitContext, Params, ParamSpec, Role, Site, Tensor
from lorac.variants.low_rank import factor_specs


def _prototypes(context: InitContext) -> Tensor:
    """Return the first right singular vector of each expert's B·A, without the product."""
    experts = context.shape[0]
    a, b = (tensor.detach().to(torch.float64) for tensor in (context.params.lora_A, context.params.lora_B))
    found = []
    for down, up in zip(a.chunk(experts), b.chunk(experts, dim=1), strict=True):
        basis, right = torch.linalg.qr(down.mT)
        found.append(basis @ torch.linalg.svd(torch.linalg.qr(up).R @ right.mT).Vh[0])
    return torch.stack(found)


@dataclass(frozen=True, kw_only=True)
class Arrow(LoraMixture, RoutedVariant):
    """``y' = y + Σ_{j ∈ top-k(z)} w_j·B_j·A_j·x``, z = |V·x|, w = softmax(z/temperature) over the chosen.

    A (experts·r, in) and B (out, experts·r) are the experts' stacked factors; each expert's scale is in its B. A row of
    V (experts, in), an expert's prototype, is the first right singular vector of its B·A. The scores z (…, experts) are
    emitted as ``"router"``.

    Attributes:
        r: rank of each expert.
        experts: number of experts.
        top_k: number of experts per token; ties go to the lowest index.
        temperature: divisor of the scores before the softmax.
        train_experts: whether A and B are trained; V never is.
    """

    r: Count = 8
    experts: Count = 4
    top_k: Count = 3
    temperature: Positive = 1.0
    train_experts: bool = False

    name = "arrow"
    paper = "Towards Modular LLMs by Building and Reusing a Library of LoRAs, arXiv 2405.11157"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        role = Role.TRAINABLE if self.train_experts else Role.FROZEN
        prototypes = ParamSpec((self.experts, site.in_features), _prototypes, Role.FROZEN)
        return factor_specs(site, self.experts * self.r, role) | {"prototypes": prototypes}

    def output_scale(self, p: Params) -> float:
        return 1.0

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        scores = F.linear(x, p.prototypes).abs()
        ctx.emit("router", scores)
        return y + self.mix(F.linear(x, p.lora_A), top_k_softmax(scores, self.top_k, self.temperature), p)
