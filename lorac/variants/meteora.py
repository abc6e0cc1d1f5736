"""MeteoRA: many existing LoRAs in every linear layer, and a gate that sends each token to its top k.

Xu, Lai, Huang, ICLR 2025, arXiv 2405.13053. Only the gates are trained, as in the paper; the released script trains
the LoRAs too (``train_experts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from lorac.errors import AdapterError
from lorac.ir.algebra.reduction import Params
from lorac.ir.host.sites import Site, SiteKind
from lorac.variants import _inits
from lorac.variants._experts import factors_of, site_of, stacked
from lorac.variants._routing import topk_gate
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Context
from lorac.variants.params import InitContext, ParamSpec, Role


@dataclass(frozen=True, kw_only=True)
class MeteoRA(BranchVariant):
    """``y' = y + s·Σ_{j ∈ top-k(z)} w_j·B_j·A_j·x``, z = G·x, w = softmax(z/temperature) over the chosen, s = alpha/r.

    A (experts·r, in) and B (out, experts·r) are the experts' factors stacked, G (experts, in) the gate. The logits z
    (…, experts) are emitted as ``"router"``.

    Attributes:
        r: rank of each expert.
        alpha: PEFT's lora_alpha, of all experts.
        experts: L, their number.
        top_k: how many each token is sent to; equal logits go to the lowest index.
        temperature: flattens the chosen weights (the paper's composite prompts take 15 to 30).
        train_experts: train A and B too.
    """

    r: int = 8
    alpha: float = 8
    experts: int = 4
    top_k: int = 2
    temperature: float = 1.0
    train_experts: bool = False

    name: ClassVar[str] = "meteora"
    paper: ClassVar[str] = "MeteoRA: Multiple-tasks Embedded LoRA for Large Language Models, arXiv 2405.13053"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR})
    emits: ClassVar[tuple[str, ...]] = ("router",)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        ranks, role = self.experts * self.r, Role.TRAINABLE if self.train_experts else Role.FROZEN
        return {
            "lora_A": ParamSpec((ranks, site.in_features), _inits.kaiming_uniform, role),
            "lora_B": ParamSpec((site.out_features, ranks), _inits.zeros, role),
            "moe_gate": ParamSpec((self.experts, site.in_features), _inits.kaiming_uniform),
        }

    def branch(self, x: torch.Tensor, y: torch.Tensor, p: Params, ctx: Context) -> torch.Tensor:
        logits = F.linear(x, p.moe_gate)
        ctx.emit("router", logits)
        weights = topk_gate(logits, self.top_k, self.temperature)
        hidden = F.linear(x, p.lora_A).unflatten(-1, (self.experts, self.r))
        gated = (hidden * weights.unsqueeze(-1)).flatten(-2)
        return y + self.expert_scale * F.linear(gated, p.lora_B)

    @property
    def expert_scale(self) -> float:
        """s, the factor of what the experts give together."""
        return self.alpha / self.r

    @staticmethod
    def from_loras(
        adapters: Sequence[Adapter],
        *,
        top_k: int = 2,
        temperature: float = 1.0,
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
            train_experts: as the variant's.
            name: the new adapter's name.
            seed: of the gates.

        Raises:
            AdapterError: no LoRA, or one that is more than its two factors on linear layers.
            ShapeMismatch: two were made for different models.
        """
        if not adapters:
            raise AdapterError("MeteoRA needs at least one LoRA", next_step="give adapters of lorac.LoRA")
        sources = [factors_of(adapter, "MeteoRA") for adapter in adapters]
        rank = max(a.shape[0] for source in sources for a, _ in source.values())
        variant = MeteoRA(
            targets=tuple(dict.fromkeys(path for source in sources for path in source)),
            r=rank,
            alpha=rank,
            experts=len(sources),
            top_k=top_k,
            temperature=temperature,
            train_experts=train_experts,
        )
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for path in variant.targets:
            a, b = stacked(path, [source.get(path) for source in sources], rank, "MeteoRA")
            context = InitContext((len(sources), a.shape[1]), site_of(path, a, b), _no_base, Params(), generator, name)
            tensors[path] = {"lora_A": a, "lora_B": b, "moe_gate": _inits.kaiming_uniform(context).to(a.dtype)}
        return Adapter(name, variant, tensors, provenance={"experts": [adapter.name for adapter in adapters]})


def _no_base() -> torch.Tensor:
    raise AssertionError("the gates of MeteoRA start without looking at the base")
