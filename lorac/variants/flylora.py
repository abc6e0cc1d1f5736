"""FlyLoRA: a frozen sparse projection whose ranks are the experts, and which of them a token takes, its router.

Zou et al., NeurIPS 2025, arXiv 2510.08396. The authors' code counts and moves the biases in every forward pass and
stops the gradient at the projection; here they move by a training rule alone, and the gradient flows unless
``detach_router`` is set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.live_terms import Dropout
from lorac.variants import _initialisers as _inits
from lorac.variants._routed import RoutedVariant
from lorac.variants._routing import top_k
from lorac.variants.base import Context
from lorac.variants.params import InitContext, ParamSpec, Role

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class FlyLoRA(RoutedVariant):
    """``y' = y + (alpha/r)·B·(u∘m)``, u = A·x, m the mask of the top_k largest of u + d.

    A (r, in) is frozen, with as many values other than 0 in each row; d (r,), ``lora_topk_bias``, changes what is
    chosen and never what it is worth. It is a buffer that no optimizer sees: a training rule that hears ``"chosen"``,
    m as numbers (…, r), moves it between steps, as the paper does to balance the ranks' load. Where top_k >= r nothing
    is chosen: there is no d, and it is a LoRA whose A is frozen, with a weight form.

    Attributes:
        r: number of ranks.
        alpha: PEFT's lora_alpha.
        top_k: how many ranks a token takes; equal scores go to the lowest index.
        dropout: rate of the dropout on the branch's input, in training.
        density: share of a row of A that is not 0; None: top_k/r.
        absolute: choose by the largest |u + d|, as the authors' single file does, not u + d, as their fork of PEFT.
        detach_router: no gradient passes through A to the layers before, as in that fork; where top_k < r.
    """

    r: int = 32
    alpha: float = 64
    top_k: int = 8
    dropout: float = 0.0
    density: float | None = None
    absolute: bool = False
    detach_router: bool = False

    name: ClassVar[str] = "flylora"
    paper: ClassVar[str] = "FlyLoRA: Implicit Rank-Wise Mixture-of-Experts, arXiv 2510.08396"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR})

    @property
    def chooses(self) -> bool:
        """Whether a token takes fewer ranks than there are."""
        return self.top_k < self.r

    @property
    def emits(self) -> tuple[str, ...]:  # type: ignore[override]  # what chooses nothing has nothing to tell
        return ("chosen",) if self.chooses else ()

    @property
    def dropout_place(self) -> Dropout:  # type: ignore[override]  # a branch drops out by itself
        return Dropout.NONE if self.chooses else Dropout.INPUT

    @property
    def routes(self) -> int:
        return self.r

    def output_scale(self, p: Params) -> float:
        return self.alpha / self.r

    def params(self, site: Site) -> dict[str, ParamSpec]:
        specs = {
            "lora_A": ParamSpec((self.r, site.in_features), self._sparse, Role.FROZEN),
            "lora_B": ParamSpec((site.out_features, self.r), _inits.zeros),
        }
        return specs | ({"lora_topk_bias": ParamSpec((self.r,), _inits.zeros, Role.BUFFER)} if self.chooses else {})

    def _sparse(self, context: InitContext) -> Tensor:
        """Of each row ⌊in·density⌋ places, one at least, drawn anew, with values of N(0, 1/r²)."""
        density = min(1.0, self.top_k / self.r) if self.density is None else self.density
        filled = max(1, math.floor(context.shape[1] * density))
        places = torch.rand(context.shape, generator=context.generator).argsort(dim=1)[:, :filled]
        values = torch.randn(places.shape, generator=context.generator) / self.r
        return torch.zeros(context.shape).scatter(1, places, values)

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        if not self.chooses:
            return y + self.output_scale(p) * F.linear(F.linear(x, p.lora_A), p.lora_B)
        if self.dropout:
            x = F.dropout(x, self.dropout, ctx.training)
        hidden = F.linear(x.detach() if self.detach_router else x, p.lora_A)
        score = hidden + p.lora_topk_bias
        chosen = top_k(score.abs() if self.absolute else score, self.top_k).to(hidden.dtype)
        ctx.emit("chosen", chosen)
        return y + F.linear(self.output_scale(p) * hidden * chosen, p.lora_B)
