"""MeteoRA: many existing LoRAs in every linear layer, and a gate that sends each token to its top k.

Xu, Lai, Huang, ICLR 2025, arXiv 2405.13053. Only the gates are trained, as in the paper; the released script trains
the LoRAs too (``train_experts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site, SiteKind
from lorac.variants import _initialisers as _inits
from lorac.variants._experts import expert_specs
from lorac.variants._routed import RoutedVariant, from_loras
from lorac.variants._routing import top_k_softmax
from lorac.variants.adapter import Adapter
from lorac.variants.base import Context
from lorac.variants.params import ParamSpec, Role


@dataclass(frozen=True, kw_only=True)
class MeteoRA(RoutedVariant):
    """``y' = y + s·Σ_{j ∈ top-k(z)} w_j·B_j·A_j·x``, z = G·x, w = softmax(z/temperature) over the chosen, s = alpha/r.

    A (experts·r, in) and B (out, experts·r) are the experts' factors stacked, G (experts, in) the gate. The logits z
    (…, experts) are emitted as ``"router"``.

    Attributes:
        r: rank of each expert.
        alpha: PEFT's lora_alpha, of all experts.
        experts: L, their number.
        top_k: how many each token is sent to; equal logits go to the lowest index.
        temperature: flattens the chosen weights (the paper's composite prompts take 15 to 30).
        dropout: rate of the dropout on the experts' input, in training; the gates see what is not dropped.
        train_experts: train A and B too.
    """

    r: int = 8
    alpha: float = 8
    experts: int = 4
    top_k: int = 2
    temperature: float = 1.0
    dropout: float = 0.0
    train_experts: bool = False

    name: ClassVar[str] = "meteora"
    paper: ClassVar[str] = "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models, arXiv 2405.13053"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR})
    emits: ClassVar[tuple[str, ...]] = ("router",)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        ranks, role = self.experts * self.r, Role.TRAINABLE if self.train_experts else Role.FROZEN
        return {
            **expert_specs(site, ranks, role),
            "moe_gate": ParamSpec((self.experts, site.in_features), _inits.kaiming_uniform),
        }

    @property
    def routes(self) -> int:
        return self.experts

    def output_scale(self, p: Params) -> float:
        return self.alpha / self.r

    def branch(self, x: torch.Tensor, y: torch.Tensor, p: Params, ctx: Context) -> torch.Tensor:
        logits = F.linear(x, p.moe_gate)
        ctx.emit("router", logits)
        weights = top_k_softmax(logits, self.top_k, self.temperature)
        dropped = F.dropout(x, self.dropout, ctx.training) if self.dropout else x
        return y + self.mixture(F.linear(dropped, p.lora_A), self.output_scale(p) * weights, p)

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
        """One routed adapter of several LoRAs, in their order; the gates start fresh.

        Each LoRA's scale is folded into its B, smaller ranks are padded with zeros (both exact), and a site that only
        some of them adapt gets zeros for the others.

        Args:
            adapters: plain LoRAs.
            top_k: as the variant's.
            temperature: as the variant's.
            dropout: as the variant's.
            train_experts: as the variant's.
            name: the new adapter's name.
            seed: of the gates.

        Raises:
            AdapterError: no LoRA, or one that is more than its two factors on linear layers.
            AdapterError: two were made for different models.
        """
        routed = MeteoRA(top_k=top_k, temperature=temperature, dropout=dropout, train_experts=train_experts)

        def make(paths: tuple[str, ...], rank: int, number: int) -> MeteoRA:
            return replace(routed, targets=paths, r=rank, alpha=rank, experts=number)

        return from_loras(adapters, "MeteoRA", make, name=name, seed=seed)
