"""CP-LoRA: a kernel's update as a sum of r outer products, one factor per axis; with a magnitude, CP-DoRA.

"LoRA-based methods on Unet for transfer learning in Subarachnoid Hematoma Segmentation", 2025, arXiv 2508.01772. The
start is lorac's: the output factor is 0, so that the start is the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.live_terms import Dropout
from lorac.variants import _initialisers as _inits
from lorac.variants.base import MATRIX_KINDS, WeightVariant
from lorac.variants.params import InitContext, ParamSpec

_AXES = ("cp_d", "cp_h", "cp_w")
"""Factors of a kernel's axes; a kernel has the last of them."""


def _uniform_over_rows(context: InitContext) -> torch.Tensor:
    """U(−1/√n, 1/√n), n the length of the axis: kaiming_uniform with a = √5."""
    bound = 1 / math.sqrt(context.shape[0])
    return torch.empty(context.shape).uniform_(-bound, bound, generator=context.generator)


@dataclass(frozen=True, kw_only=True)
class CPLoRA(WeightVariant):
    """``W'[o,i,u,v] = W[o,i,u,v] + s·Σ_p a[o,p]·b[i,p]·c[u,p]·d[v,p]``, p up to r, with s = alpha/r.

    a is ``cp_out`` (O, r), b ``cp_in`` (I/g, r), c ``cp_h`` (kh, r), d ``cp_w`` (kw, r), for g groups; a 3-D kernel
    has ``cp_d`` before them, a 1-D one ``cp_w`` only, and a linear layer none, where it is LoRA.
    With ``dora``, W' = (m/n) ∘ (the above), n its row norms (O,), constant in the backward pass, m (O,) trained.

    Attributes:
        r: rank, which may exceed the channels.
        alpha: LoRA's.
        dropout: rate of the dropout on the input, in training.
        dora: with a trained magnitude.
        rank_pattern, alpha_pattern: module pattern -> its own r or alpha.
    """

    r: int = 8
    alpha: float = 8
    dropout: float = 0.0
    dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    name: ClassVar[str] = "cp_lora"
    paper: ClassVar[str] = (
        "LoRA-based methods on Unet for transfer learning in Subarachnoid Hematoma Segmentation, arXiv 2508.01772"
    )
    kinds: ClassVar[frozenset[SiteKind]] = MATRIX_KINDS - {SiteKind.EMBEDDING}
    dropout_place: ClassVar[Dropout] = Dropout.INPUT
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def params(self, site: Site) -> dict[str, ParamSpec]:
        lengths = {"cp_in": site.in_features}
        if site.conv is not None:
            kernel = site.conv.kernel
            lengths = dict(zip(_AXES[-len(kernel) :], kernel, strict=True))
            lengths = {"cp_in": site.conv.channels // site.conv.groups, **lengths}
        specs = {"cp_out": ParamSpec((site.out_features, self.r), _inits.zeros)}
        specs |= {name: ParamSpec((length, self.r), _uniform_over_rows) for name, length in lengths.items()}
        if self.dora:
            specs["magnitude"] = ParamSpec((site.out_features,), _inits.row_norms)
        return specs

    def weight(self, W: torch.Tensor, p: Params) -> torch.Tensor:
        up, down = p.cp_out, p.cp_in.t()
        for axis in (getattr(p, name) for name in _AXES if hasattr(p, name)):
            down = (down[:, :, None] * axis.t()[:, None, :]).flatten(1)
        delta = up @ down
        # The update of a grouped kernel as it is stored: few values, no rank worth keeping apart.
        groups = W.shape[1] // down.shape[1]
        updated = W + (self.alpha / self.r) * (delta if groups == 1 else torch.block_diag(*delta.chunk(groups)))
        if not self.dora:
            return updated
        norm = torch.linalg.vector_norm(updated, dim=1).detach()
        return (p.magnitude / norm)[:, None] * updated
