"""LoHa: the Hadamard product of two low-rank matrices.

FedPara: Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS: Yeh et al. 2023, arXiv 2309.14859; shapes and initialisation
as in PEFT's LOHA.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site
from lorac.variants import _conv_kernels as _kernels
from lorac.variants import _initialisers as _inits
from lorac.variants.base import WeightVariant
from lorac.variants.params import ParamSpec


@dataclass(frozen=True, kw_only=True)
class LoHa(WeightVariant):
    """``W' = W + (alpha/r)·(A₁·B₁)∘(A₂·B₂)``, a change of rank up to r².

    Attributes:
        r: rank of each product.
        alpha: the scale's numerator.
        effective_conv2d: PEFT's use_effective_conv2d: kernels of more than one tap are factored along all their axes,
            by cores ``hada_t1`` and ``hada_t2`` (r, r, taps).
        rank_pattern, alpha_pattern: module pattern -> its own r or alpha.
    """

    r: int = 8
    alpha: float = 8
    effective_conv2d: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    name: ClassVar[str] = "loha"
    paper: ClassVar[str] = "FedPara: Low-Rank Hadamard Product, arXiv 2108.06098; LyCORIS, arXiv 2309.14859"
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    @property
    def scale(self) -> float:
        """alpha/r."""
        return self.alpha / self.r

    def params(self, site: Site) -> dict[str, ParamSpec]:
        out, r = site.out_features, self.r
        channels, taps = _kernels.kernel_columns(site)
        uniform, zeros = _inits.kaiming_uniform, _inits.zeros
        if not (self.effective_conv2d and taps > 1):
            a, b = (out, r), (r, channels * taps)
            cores = {}
        else:
            a, b = (r, out), (r, channels)
            cores = {name: ParamSpec((r, r, taps), _kernels.uniform_core) for name in ("hada_t1", "hada_t2")}
        return {
            "hada_w1_a": ParamSpec(a, uniform),
            "hada_w1_b": ParamSpec(b, uniform),
            "hada_w2_a": ParamSpec(a, uniform),
            "hada_w2_b": ParamSpec(b, zeros),
            **cores,
        }

    def weight(self, W: torch.Tensor, p: Params) -> torch.Tensor:
        return W + _kernels.expand_groups(self.scale * (_product(p, 1) * _product(p, 2)), W)


def _product(p: Params, which: int) -> torch.Tensor:
    """The first or second factor of the Hadamard product (out, in/groups·taps)."""
    a, b, core = (getattr(p, f"hada_{name}", None) for name in (f"w{which}_a", f"w{which}_b", f"t{which}"))
    assert a is not None
    assert b is not None
    return a @ b if core is None else _kernels.tucker_kernel(core, a, b)
