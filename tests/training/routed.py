"""Routed methods in a few lines, for the rules that train routers: FlyLoRA's choice of ranks, ReMix's draws."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

import lorac
from lorac.training import draw_ordered, ordered_log_prob
from lorac.variants._routing import top_k


def _normal(context: Any) -> Tensor:
    return torch.empty(context.shape).normal_(0, 0.4, generator=context.generator)


def _zeros(context: Any) -> Tensor:
    return torch.zeros(context.shape)


@dataclass(frozen=True, kw_only=True)
class Ranks(lorac.BranchVariant):
    """The k ranks of a frozen A that a token chooses by their value plus a bias."""

    r: int = 6
    k: int = 2

    name: ClassVar[str] = "chosen_ranks"
    emits: ClassVar[tuple[str, ...]] = ("chosen",)

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {
            "lora_A": lorac.ParamSpec((self.r, site.in_features), _normal, lorac.Role.FROZEN),
            "lora_B": lorac.ParamSpec((site.out_features, self.r), _zeros),
            "lora_topk_bias": lorac.ParamSpec((self.r,), _zeros, lorac.Role.BUFFER),
        }

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        down = F.linear(x, p.lora_A)
        chosen = top_k(down + p.lora_topk_bias, self.k).to(down.dtype)
        ctx.emit("chosen", chosen)
        return y + F.linear(down * chosen, p.lora_B)


@dataclass(frozen=True, kw_only=True)
class Draws(lorac.BranchVariant):
    """k of n experts, drawn while training and the likeliest ones else, each with the same weight."""

    r: int = 2
    experts: int = 4
    k: int = 2

    name: ClassVar[str] = "drawn_experts"
    emits: ClassVar[tuple[str, ...]] = ("log_prob",)

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {
            "lora_A": lorac.ParamSpec((self.experts, self.r, site.in_features), _normal),
            "lora_B": lorac.ParamSpec((self.experts, site.out_features, self.r), _zeros),
            "router": lorac.ParamSpec((self.experts, site.in_features), _zeros),
        }

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        logits = F.linear(x.detach(), p.router)
        if ctx.training:
            chosen = draw_ordered(logits.detach(), self.k, ctx.generator)
            ctx.emit("log_prob", ordered_log_prob(logits, chosen))
            mask = torch.zeros_like(logits).scatter(-1, chosen, 1.0).detach()
        else:
            mask = top_k(logits, self.k).to(x.dtype)
            ctx.emit("log_prob", logits.sum(-1) * 0)
        down = torch.einsum("...i,eri->...er", x, p.lora_A)
        return y + torch.einsum("...er,eor,...e->...o", down, p.lora_B, mask)
