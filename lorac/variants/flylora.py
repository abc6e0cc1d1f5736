"""FlyLoRA: a frozen sparse projection; its ranks are experts, and its output routes each token.

Zou et al., NeurIPS 2025, arXiv 2510.08396. The authors' code counts choices and updates the biases in every
forward pass, and stops the gradient at the projection; here a training rule updates them, and the gradient flows
unless ``detach_router`` is set.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from lorac.argument_types import Bounds, Count
from lorac.variants._mixtures import RoutedVariant, top_k_mask
from lorac.variants.base import Context, Dropout, InitContext, Params, ParamSpec, Role, Site, Tensor
from lorac.variants.initialisers import zeros


@dataclass(frozen=True, kw_only=True)
class FlyLoRA(RoutedVariant):
    """``y' = y + (alpha/r)·B·(u∘m)``, u = A·x, m the mask of the top_k largest of u + d.

    A (r, in) is frozen, with the same number of non-zero values in each row; d (r,), ``lora_topk_bias``, changes which
    ranks are chosen, not their values. d is a buffer without gradients: a training rule that reads ``"chosen"``, m as
    numbers (…, r), updates it between steps, as the paper does to balance the ranks' load. With top_k >= r there is no
    choice and no d: it is a LoRA with a frozen A, which has a weight form.

    Attributes:
        r: number of ranks.
        alpha: PEFT's lora_alpha.
        top_k: number of ranks per token; ties go to the lowest index.
        dropout: rate of the dropout on the branch's input, in training.
        density: share of non-zero values in a row of A; None: top_k/r.
        absolute: whether to choose by |u + d|, as the authors' single file does; else by u + d, as their fork of PEFT
            does.
        detach_router: whether gradients stop at A, as in that fork; only if top_k < r.
    """

    r: Count = 32
    alpha: float = 64
    top_k: Count = 8
    dropout: float = 0.0
    density: Annotated[float | None, Bounds(0, 1, exclusive=True)] = None
    absolute: bool = False
    detach_router: bool = False

    name = "flylora"
    paper = "FlyLoRA: Implicit Rank-Wise Mixture-of-Experts, arXiv 2510.08396"

    @property
    def chooses(self) -> bool:
        """Whether each token uses fewer than all ranks."""
        return self.top_k < self.r

    @property
    def emits(self) -> tuple[str, ...]:  # type: ignore[override]  # it depends on top_k
        return ("chosen",) if self.chooses else ()

    @property
    def dropout_place(self) -> Dropout:  # type: ignore[override]  # it depends on top_k
        return Dropout.NONE if self.chooses else Dropout.INPUT

    @property
    def routes(self) -> int:
        return self.r

    def output_scale(self, p: Params) -> float:
        return self.alpha / self.r

    def params(self, site: Site) -> dict[str, ParamSpec]:
        specs = {
            "lora_A": ParamSpec((self.r, site.in_features), self._sparse, Role.FROZEN),
            "lora_B": ParamSpec((site.out_features, self.r), zeros),
        }
        return specs | ({"lora_topk_bias": ParamSpec((self.r,), zeros, Role.BUFFER)} if self.chooses else {})

    def _sparse(self, context: InitContext) -> Tensor:
        """Draw ⌊in·density⌋ positions of each row, at least one, with values from N(0, 1/r²)."""
        density = min(1.0, self.top_k / self.r) if self.density is None else self.density
        filled = max(1, math.floor(context.shape[1] * density))
        positions = torch.rand(context.shape, generator=context.generator).argsort(dim=1)[:, :filled]
        values = torch.randn(positions.shape, generator=context.generator) / self.r
        return torch.zeros(context.shape).scatter(1, positions, values)

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        if not self.chooses:
            return y + self.output_scale(p) * F.linear(F.linear(x, p.lora_A), p.lora_B)
        if self.dropout:
            x = F.dropout(x, self.dropout, ctx.training)
        hidden = F.linear(x.detach() if self.detach_router else x, p.lora_A)
        score = hidden + p.lora_topk_bias
        chosen = top_k_mask(score.abs() if self.absolute else score, self.top_k).to(hidden.dtype)
        ctx.emit("chosen", chosen)
        return y + F.linear(self.output_scale(p) * hidden * chosen, p.lora_B)
