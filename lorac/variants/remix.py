"""ReMix: several LoRAs in every layer; a policy chooses k of them, with equal weights.

"ReMix: Reinforcement Routing for Mixtures of LoRAs in LLM Finetuning", Qiu et al. 2026, arXiv 2603.10160; no code is
published. The choice is not differentiable: the router learns from the loss through the probability of its draws, which
is emitted.
"""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorac.argument_types import Count
from lorac.variants._mixtures import RoutedVariant, add_gumbel_noise, ordered_log_prob, top_k_mask
from lorac.variants.base import Context, Dropout, Params, ParamSpec, Site, Tensor
from lorac.variants.initialisers import zeros
from lorac.variants.low_rank import factor_specs


@dataclass(frozen=True, kw_only=True)
class ReMix(RoutedVariant):
    """``y' = y + ω·Σ_{i chosen} B_i·A_i·x``, ω = alpha/(top_k·r), or alpha/√(top_k·r) under rsLoRA.

    A (experts·r, in) and B (out, experts·r) are the experts' stacked factors, and P (experts, in) is the router. In
    training a token's experts are drawn from q = softmax(P·x) without replacement, independently at each site;
    otherwise they are the top_k experts with the largest logits. The branch emits ``"router"``, the logits P·x (…,
    experts), and ``"log_prob"`` (…), the log-probability of the choice in its order: log Π_j q_j/(1 − Σ_{i<j} q_i). A
    gradient reaches P only through these outputs, and does not continue to x; ``lorac.training.sampled_selection_loss``
    is the loss that computes it. With top_k >= experts all experts act: it is a LoRA of rank experts·r without a
    router.

    Attributes:
        r: rank of each expert.
        alpha: numerator of ω.
        rslora: whether ω is divided by the square root.
        experts: number n of experts.
        top_k: number k of experts that act for a token; ties go to the lowest index.
        dropout: rate of the dropout on the branch's input, in training.
    """

    r: Count = 8
    alpha: float = 2
    rslora: bool = False
    experts: Count = 8
    top_k: Count = 4
    dropout: float = 0.0

    name = "remix"
    paper = "ReMix: Reinforcement Routing for Mixtures of LoRAs, arXiv 2603.10160"

    @property
    def chooses(self) -> bool:
        """Whether fewer than all experts act on a token."""
        return self.top_k < self.experts

    @property
    def emits(self) -> tuple[str, ...]:  # type: ignore[override]  # it depends on top_k
        return ("router", "log_prob") if self.chooses else ()

    @property
    def learns_from(self) -> Mapping[str, str]:  # type: ignore[override]  # it depends on top_k
        return {"router": "log_prob"} if self.chooses else {}

    @property
    def dropout_place(self) -> Dropout:  # type: ignore[override]  # it depends on top_k
        return Dropout.NONE if self.chooses else Dropout.INPUT

    @property
    def routes(self) -> int:
        return self.experts

    def output_scale(self, p: Params) -> float:
        acting = min(self.top_k, self.experts) * self.r
        return self.alpha / (math.sqrt(acting) if self.rslora else acting)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        specs = factor_specs(site, self.experts * self.r)
        return specs | ({"router": ParamSpec((self.experts, site.in_features), zeros)} if self.chooses else {})

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        if not self.chooses:
            return y + self.output_scale(p) * F.linear(F.linear(x, p.lora_A), p.lora_B)
        logits = F.linear(x.detach(), p.router)
        keys = self._keys(logits.detach(), ctx)
        ctx.emit("router", logits)
        ctx.emit("log_prob", ordered_log_prob(logits, keys.topk(self.top_k, dim=-1).indices))
        dropped = F.dropout(x, self.dropout, ctx.training) if self.dropout else x
        weights = self.output_scale(p) * top_k_mask(keys, self.top_k).to(x.dtype)
        return y + self.mix(F.linear(dropped, p.lora_A), weights, p)

    def _keys(self, logits: Tensor, ctx: Context) -> Tensor:
        """Return the keys that order the experts: the logits, plus noise in training so that the order is a draw."""
        if ctx.generator is None:
            return logits
        # The generator has the same seed at all sites, but their draws must be independent.
        seed = ctx.generator.initial_seed() ^ zlib.crc32(ctx.site.path.encode())
        return add_gumbel_noise(logits, torch.Generator().manual_seed(seed))
