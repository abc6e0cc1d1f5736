"""LoRA-XS: an r x r core between two frozen factors of the weight itself; LoRA-SB: of an estimated update.

Bałazy, Banaei et al. 2024, arXiv 2405.17604; Ponkshe, Singhal et al. 2024 (LoRA-SB), arXiv 2411.19557.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from lorac.errors import AdapterError, SiteError
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site
from lorac.ir.slots.live_terms import Dropout
from lorac.variants import _initialisers as _inits
from lorac.variants.adapter import Adapter
from lorac.variants.base import WeightVariant
from lorac.variants.params import InitContext, ParamSpec, Role

Tensor = torch.Tensor
_EXACT = 512
"""Smaller side of a weight up to which its SVD is computed whole."""
_ROUNDS, _SPARE = 10, 10
"""Rounds and spare columns of the randomised SVD."""


def _left_vectors(context: InitContext) -> Tensor:
    return _singular_vectors(context.weight(), context.shape[1], context.generator)


def _singular_vectors(W: Tensor, r: int, generator: torch.Generator) -> Tensor:
    """U_r (out, r), the first left singular vectors of W, the largest entry of each positive."""
    if min(W.shape) <= max(_EXACT, 4 * r):
        vectors = torch.linalg.svd(W, full_matrices=False).U[:, :r]
    else:
        vectors = _randomised_svd(W, r, generator)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign()


def _right_factor(context: InitContext) -> Tensor:
    """Σ_r·V_rᵀ (r, in), which is U_rᵀ·W."""
    return context.params.lora_B.t() @ context.weight()


def _randomised_svd(W: Tensor, r: int, generator: torch.Generator) -> Tensor:
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

    @classmethod
    def from_update(
        cls, updates: Mapping[str, Tensor], *, name: str, r: int = 32, alpha: float | None = None
    ) -> Adapter:
        """LoRA-SB: a core that begins as the best approximation of rank r of the first step of full fine-tuning.

        B = U_r, A = V_rᵀ and R = diag(σ)·r/alpha of the update's SVD, so W' is not W at the start, by design. For
        AdamW the first step is −η·sign(G), η its first learning rate and G the gradient summed over some batches.

        Args:
            updates: path of a site -> estimated update of its weight (out, in).
            name: of the adapter.
            r: rank, at most min(out, in) of every site.
            alpha: None for r, the paper's.

        Raises:
            AdapterError: an update is no matrix of rank r or more.
        """
        variant = cls(r=r, alpha=r if alpha is None else alpha, targets=tuple(updates))
        generator = torch.Generator().manual_seed(0)
        adapter = Adapter(name, variant)
        for path, update in updates.items():
            if update.ndim != 2 or min(update.shape) < r:
                raise AdapterError(
                    f"the update of '{path}' is {list(update.shape)}, which has no {r} singular vectors",
                    next_step="give (out, in) as the site presents its weight, or a smaller r",
                    code="shape_mismatch",
                )
            left = _singular_vectors(update, r, generator)
            right = left.t() @ update
            sizes = torch.linalg.vector_norm(right, dim=1)
            adapter.tensors[path] = {
                "lora_B": left,
                "lora_A": right / sizes.clamp_min(torch.finfo(update.dtype).tiny)[:, None],
                "lora_latent": torch.diag(sizes * r / variant.alpha),
            }
        return adapter

    def check(self, site: Site) -> None:
        super().check(site)
        most = min(site.out_features, site.in_features)
        if self.r > most:
            raise SiteError(
                f"the weight of '{site.path}' ({site.in_features} -> {site.out_features}) has no {self.r} "
                "singular vectors for LoRA-XS",
                nearest=f"r={most}",
                next_step="give a smaller r, or exclude= the module",
                code="site_unsupported",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            "lora_B": ParamSpec((site.out_features, self.r), _left_vectors, role=Role.FROZEN),
            "lora_A": ParamSpec((self.r, site.in_features), _right_factor, role=Role.FROZEN),
            "lora_latent": ParamSpec((self.r, self.r), _inits.normal(1e-5), decay=False),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + self.alpha / self.r * ((p.lora_B @ p.lora_latent) @ p.lora_A)
