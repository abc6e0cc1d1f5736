"""ReMix: several LoRAs in every layer, of which a policy chooses k that all weigh the same.

"ReMix: Reinforcement Routing for Mixtures of LoRAs in LLM Finetuning", Qiu et al. 2026, arXiv 2603.10160; no code is
published. What chooses is no part of what is differentiated: the router learns from the loss by how likely its draws
were, which is emitted.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.live_terms import Dropout
from lorac.variants import _initialisers as _inits
from lorac.variants._experts import expert_specs
from lorac.variants._routed import RoutedVariant
from lorac.variants._routing import add_gumbel_noise, ordered_log_prob, top_k
from lorac.variants.base import Context
from lorac.variants.params import ParamSpec, Role

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class ReMix(RoutedVariant):
    """``y' = y + ω·Σ_{i chosen} B_i·A_i·x``, ω = alpha/(top_k·r), or alpha/√(top_k·r) under rsLoRA.

    A (experts·r, in) and B (out, experts·r) are the experts' factors stacked, the router P (experts, in). In training
    a token's experts are drawn one after the other from q = softmax(P·x), none twice, at each site by itself; else
    they are the top_k largest. Emitted are ``"router"``, the logits P·x (…, experts), and ``"log_prob"``, how likely
    what was chosen is, in the order in which it was (…): log Π_j q_j/(1 − Σ of those before). Only by these a
    gradient reaches P, and none of them reaches x. Where top_k >= experts all act: it is a LoRA of rank experts·r,
    without a router.

    Attributes:
        r: rank of each expert.
        alpha: of ω.
        rslora: divide by the root.
        experts: n, their number.
        top_k: k, how many act for a token; equal logits go to the lowest index.
        dropout: rate of the dropout on the branch's input, in training.
    """

    r: int = 8
    alpha: float = 2
    rslora: bool = False
    experts: int = 8
    top_k: int = 4
    dropout: float = 0.0

    name: ClassVar[str] = "remix"
    paper: ClassVar[str] = "ReMix: Reinforcement Routing for Mixtures of LoRAs, arXiv 2603.10160"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR})

    @property
    def chooses(self) -> bool:
        """Whether fewer experts act than there are."""
        return self.top_k < self.experts

    @property
    def emits(self) -> tuple[str, ...]:  # type: ignore[override]  # what chooses nothing has nothing to tell
        return ("router", "log_prob") if self.chooses else ()

    @property
    def dropout_place(self) -> Dropout:  # type: ignore[override]  # a branch drops out by itself
        return Dropout.NONE if self.chooses else Dropout.INPUT

    @property
    def routes(self) -> int:
        return self.experts

    def output_scale(self, p: Params) -> float:
        acting = min(self.top_k, self.experts) * self.r
        return self.alpha / (math.sqrt(acting) if self.rslora else acting)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        specs = expert_specs(site, self.experts * self.r, Role.TRAINABLE)
        return specs | ({"router": ParamSpec((self.experts, site.in_features), _inits.zeros)} if self.chooses else {})

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        if not self.chooses:
            return y + self.output_scale(p) * F.linear(F.linear(x, p.lora_A), p.lora_B)
        logits = F.linear(x.detach(), p.router)
        keys = self._keys(logits.detach(), ctx)
        ctx.emit("router", logits)
        ctx.emit("log_prob", ordered_log_prob(logits, keys.topk(self.top_k, dim=-1).indices))
        dropped = F.dropout(x, self.dropout, ctx.training) if self.dropout else x
        weights = self.output_scale(p) * top_k(keys, self.top_k).to(x.dtype)
        return y + self.mixture(F.linear(dropped, p.lora_A), weights, p)

    def _keys(self, logits: Tensor, ctx: Context) -> Tensor:
        """By what the experts are put in order: the logits, and in training noise that makes a draw of it."""
        if ctx.generator is None:
            return logits
        # The stream begins alike at all sites, whose draws are to be independent.
        own = torch.Generator().manual_seed(ctx.generator.initial_seed() ^ zlib.crc32(ctx.site.path.encode()))
        return add_gumbel_noise(logits, own)
