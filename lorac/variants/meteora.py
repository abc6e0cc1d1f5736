"""MeteoRA: existing LoRAs as experts in every linear layer, with a gate that sends each token to its top k.

Xu, Lai, Huang, ICLR 2025, arXiv 2405.13053. Only the gates are trained, as in the paper; the released script trains
the LoRAs too (``train_experts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from lorac.argument_types import Count, Positive
from lorac.variants._mixtures import RoutedVariant, route_loras, top_k_softmax
from lorac.variants.adapter import Adapter
from lorac.variants.base import Context, Params, ParamSpec, Role, Site, Tensor
from lorac.variants.initialisers import kaiming_uniform
from lorac.variants.low_rank import factor_specs


@dataclass(frozen=True, kw_only=True)
class MeteoRA(RoutedVariant):
    """``y' = y + s·Σ_{j ∈ top-k(z)} w_j·B_j·A_j·x``, z = G·x, w = softmax(z/temperature) over the chosen, s = alpha/r.

    A (experts·r, in) and B (out, experts·r) are the experts' factors stacked, G (experts, in) the gate. The logits z
    (…, experts) are emitted as ``"router"``.

    Attributes:
        r: rank of each expert.
        alpha: PEFT's lora_alpha, of all experts.
        experts: their number L.
        top_k: number of experts per token; ties go to the lowest index.
        temperature: flattens the weights (15 to 30 for the paper's composite prompts).
        dropout: rate of the dropout on each expert's own input, in training; the gates read the whole input.
        train_experts: train A and B too.
    """

    r: Count = 8
    alpha: float = 8
    experts: Count = 4
    top_k: Count = 2
    temperature: Positive = 1.0
    dropout: float = 0.0
    train_experts: bool = False

    name = "meteora"
    paper = "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models, arXiv 2405.13053"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        role = Role.TRAINABLE if self.train_experts else Role.FROZEN
        gate = ParamSpec((self.experts, site.in_features), kaiming_uniform)
        return factor_specs(site, self.experts * self.r, role) | {"moe_gate": gate}

    @property
    def routes(self) -> int:
        return self.experts

    def output_scale(self, p: Params) -> float:
        return self.alpha / self.r

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        logits = F.linear(x, p.moe_gate)
        ctx.emit("router", logits)
        weights = top_k_softmax(logits, self.top_k, self.temperature)
        return y + self.mix(self._project(x, p, ctx), self.output_scale(p) * weights, p)

    def _project(self, x: Tensor, p: Params, ctx: Context) -> Tensor:
        """Return A·x (…, experts·r) in which every expert drops other features of x."""
        if not self.dropout or not ctx.training:
            return F.linear(x, p.lora_A)
        each = (F.linear(F.dropout(x, self.dropout), a) for a in p.lora_A.chunk(self.experts))
        return torch.cat([*each], dim=-1)

    @staticmethod
    def from_loras(
        adapters: Sequence[Adapter],
        *,
        top_k: int = 2,
        temperature: float = 1.0,
        dropout: float = 0.0,
        train_experts: bool = False,
        name: str = "meteora",
        seed: int = 0,
    ) -> Adapter:
        """Return one routed adapter made from several LoRAs, in their order; the gates are freshly initialised.

        Each LoRA's scale is folded into its B, and smaller ranks are padded with zeros (both exact). Where only some of
        the LoRAs adapt a site, the others' factors are zero.

        Args:
            adapters: plain LoRAs.
            top_k, temperature, dropout, train_experts: fields of the variant.
            name: the new adapter's name.
            seed: seed of the gates.

        Raises:
            AdapterError: there is no LoRA, one has more than its two factors on linear layers, or two were made for
                different models.
        """
        routed = MeteoRA(top_k=top_k, temperature=temperature, dropout=dropout, train_experts=train_experts)

        def make_variant(paths: tuple[str, ...], rank: int, number: int) -> MeteoRA:
            return replace(routed, targets=paths, r=rank, alpha=rank, experts=number)

        return route_loras(adapters, "MeteoRA", make_variant, name=name, seed=seed)
