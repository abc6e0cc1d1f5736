"""LoRA-XS: an r x r core between two frozen factors of the weight itself.

Bałazy, Banaei et al. 2024, arXiv 2405.17604.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorac.errors import SiteUnsupported
from lorac.ir.sites import Site
from lorac.ir.types import Dropout, InitContext, Params, ParamSpec, Role
from lorac.variants import _inits
from lorac.variants.base import WeightVariant

Tensor = torch.Tensor
_EXACT = 512
"""Smaller side of a weight up to which its SVD is computed whole."""
_ROUNDS, _SPARE = 10, 10
"""Rounds and spare columns of the randomised SVD."""


def _left(context: InitContext) -> Tensor:
    """U_r (out, r), the first left singular vectors of W, the largest entry of each positive."""
    W, r = context.weight(), context.shape[1]
    if min(W.shape) <= max(_EXACT, 4 * r):
        vectors = torch.linalg.svd(W, full_matrices=False).U[:, :r]
    else:
        vectors = _sketched(W, r, context.generator)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def _right(context: InitContext) -> Tensor:
    """Σ_r·V_rᵀ (r, in), which is U_rᵀ·W."""
    return context.params.lora_B.t() @ context.weight()


def _sketched(W: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """U_r (out, r) by subspace iteration from random columns."""
    found = torch.randn(W.shape[1], r + _SPARE, generator=generator).to(W)
    for _ in range(_ROUNDS):
        found = W.t() @ torch.linalg.qr(W @ found).Q
    basis = torch.linalg.qr(W @ found).Q
    return (basis @ torch.linalg.svd(basis.t() @ W, full_matrices=False).U)[:, :r]


@dataclass(frozen=True, kw_only=True)
class LoRAXS(WeightVariant):
    """``W' = W + (alpha/r)·B·R·A``, R (r, r) trained, B = U_r and A = Σ_r·V_rᵀ frozen, of the truncated SVD of W.

    Attributes:
        r: rank, at most min(out, in).
        alpha: the scale is alpha/r.
        dropout: rate of the dropout on the branch's input, in training.
    """

    r: int = 32
    alpha: float = 32
    dropout: float = 0.0

    name: ClassVar[str] = "loraxs"
    paper: ClassVar[str] = "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters, arXiv 2405.17604"
    dropout_place: ClassVar[Dropout] = Dropout.INPUT
    identity_at_init: ClassVar[bool] = False

    def check(self, site: Site) -> None:
        super().check(site)
        most = min(site.out_features, site.in_features)
        if self.r > most:
            raise SiteUnsupported(
                f"the weight of '{site.path}' ({site.in_features} -> {site.out_features}) has no {self.r} "
                "singular vectors for LoRA-XS",
                nearest=f"r={most}",
                next_step="give a smaller r, or exclude= the module",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            "lora_B": ParamSpec((site.out_features, self.r), _left, role=Role.FROZEN),
            "lora_A": ParamSpec((self.r, site.in_features), _right, role=Role.FROZEN),
            "lora_latent": ParamSpec((self.r, self.r), _inits.normal(1e-5), decay=False),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + self.alpha / self.r * ((p.lora_B @ p.lora_latent) @ p.lora_A)
