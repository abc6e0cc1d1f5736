"""DEFT: a subspace of the weight's outputs is removed, and trained values replace it; PaRa only removes.

DEFT, NeurIPS 2025; Chen et al. 2024 (PaRa), arXiv 2406.05641. Projectors, scale and start values as in PEFT's DEFT.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Count, OneOf
from lorac.variants.base import InitContext, Params, ParamSpec, Site, Tensor, WeightVariant
from lorac.variants.initialisers import normal


@dataclass(frozen=True, kw_only=True)
class DEFT(WeightVariant):
    """``W' = W − Q·Mᵀ·W + s·Q·R`` with deft_P (out, r) and deft_R (r, in); the rank is at most out.

    Q = P and M = relu(P), or Q = M, the orthonormal factor of P = Q·T. deft_R starts at Mᵀ·W/s, so that W' = W.

    Attributes:
        r: rank.
        alpha: s = alpha/rank with the site's rank; None or 0 for s = 1.
        decomposition_method: ``"relu"`` or ``"qr"``.
        para: whether to use PaRa, W' = W − Q·Mᵀ·W, without deft_R.
    """

    r: Count = 8
    alpha: float | None = None
    decomposition_method: Annotated[str, OneOf(("relu", "qr"))] = "relu"
    para: bool = False

    name = "deft"
    paper = (
        "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models, NeurIPS 2025; "
        "PaRa: Personalizing Text-to-Image Diffusion via Parameter Rank Reduction, arXiv 2406.05641"
    )

    @property
    def identity_at_init(self) -> bool:  # type: ignore[override]  # it depends on para
        """True unless ``para``: the start value of deft_R undoes the removal."""
        return not self.para

    def params(self, site: Site) -> dict[str, ParamSpec]:
        rank = min(self.r, site.out_features)
        specs = {"deft_P": ParamSpec((site.out_features, rank), normal(0.02))}
        return specs if self.para else specs | {"deft_R": ParamSpec((rank, site.in_features), self._start)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        q, m = self._project(p.deft_P)
        removed = m.t() @ W
        return W - q @ removed if self.para else W + q @ (self._scale(p.deft_P) * p.deft_R - removed)

    def _project(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        if self.decomposition_method == "relu":
            return directions, torch.relu(directions)
        q = torch.linalg.qr(directions).Q
        return q, q

    def _scale(self, directions: Tensor) -> float:
        return self.alpha / directions.shape[1] if self.alpha else 1.0

    def _start(self, context: InitContext) -> Tensor:
        directions, weight = context.params.deft_P, context.weight()
        return self._project(directions.to(weight))[1].t() @ weight / self._scale(directions)
