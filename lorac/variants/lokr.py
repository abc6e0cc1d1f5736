"""LoKr and LoHa: the Kronecker product of two small matrices, and the Hadamard product of two low-rank matrices.

LyCORIS: Yeh et al. 2023, arXiv 2309.14859; KronA: Edalati et al. 2022, arXiv 2212.10650; shapes, initialisation and
scale as in PEFT's LOKR.
"""

import math
from dataclasses import dataclass

import torch

from lorac.errors import SiteError
from lorac.variants._layer_shapes import expand_groups, kernel_columns, multiply_factors, uniform_core
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import kaiming_uniform, zeros
from lorac.variants.low_rank import ScaledRank


@dataclass(frozen=True, kw_only=True)
class LoKr(ScaledRank, WeightVariant):
    """``W' = W + (alpha/r)·kron(w1, w2)`` with w1 (l, m) and w2 (k, n·taps), out = l·k, in = m·n.

    Attributes:
        r: rank of the factors of w2, which is factored if r < max(k, n)/2, and of w1 with ``decompose_both``.
        decompose_both: whether w1 is factored too, if r < max(l, m)/2.
        decompose_factor: a number: l and m, if it divides; else the next smaller divisor. −1: the divisor nearest to
            the square root. A pair: l and m.
        effective_conv2d: PEFT's use_effective_conv2d: a factored w2 of more than one tap has a core ``lokr_t2``
            (r, r, taps).
        conv1d_of_peft: PEFT's product of a whole w2 (k, n, taps) at a Conv1d: kron of (1, l, m) and it, reshaped to W.
    """

    decompose_both: bool = False
    decompose_factor: int | tuple[int, int] = -1
    effective_conv2d: bool = False
    conv1d_of_peft: bool = False

    name = "lokr"
    paper = "LyCORIS: Navigating Text-To-Image Customization, arXiv 2309.14859"

    def check(self, site: Site) -> None:
        super().check(site)
        factor = self.decompose_factor
        sizes = (site.out_features, kernel_columns(site)[0])
        if isinstance(factor, int):
            wrong = factor < 1 and factor != -1
        else:
            wrong = any(part < 1 or size % part for size, part in zip(sizes, factor, strict=True))
        if wrong:
            raise SiteError(
                f"decompose_factor={factor} divides neither side of '{site.path}'",
                next_step="give a number above 0, or -1 for the divisors nearest to the square root",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        channels, taps = kernel_columns(site)
        r, (l, k), (m, n) = self.r, self._divide(site.out_features, 0), self._divide(channels, 1)
        specs = {"lokr_w1": ParamSpec((l, m), zeros)}  # w1 starts at zero, and so does the product
        if self.decompose_both and r < max(l, m) / 2:
            specs = {"lokr_w1_a": ParamSpec((l, r), zeros), "lokr_w1_b": ParamSpec((r, m), kaiming_uniform)}
        if r >= max(k, n) / 2:
            apart = self.conv1d_of_peft and site.kind is SiteKind.CONV1D
            return specs | {"lokr_w2": ParamSpec((k, n, taps) if apart else (k, n * taps), kaiming_uniform)}
        core = self.effective_conv2d and taps > 1
        specs |= {"lokr_t2": ParamSpec((r, r, taps), uniform_core)} if core else {}
        return specs | {
            "lokr_w2_a": ParamSpec((r, k) if core else (k, r), kaiming_uniform),
            "lokr_w2_b": ParamSpec((r, n if core else n * taps), kaiming_uniform),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        w1 = p.lokr_w1 if hasattr(p, "lokr_w1") else _product(p, "lokr_w1", "")
        w2 = p.lokr_w2 if hasattr(p, "lokr_w2") else _product(p, "lokr_w2", "lokr_t2")
        product = torch.kron(w1, w2)
        if w2.dim() == 3:
            product = product.reshape(W.shape[0], -1)
        return W + expand_groups(self.scale * product, W)

    def _divide(self, number: int, side: int) -> tuple[int, int]:
        """Return the two factors of a side of the weight."""
        factor = self.decompose_factor
        return factors(number, factor) if isinstance(factor, int) else (factor[side], number // factor[side])


def factors(number: int, factor: int) -> tuple[int, int]:
    """Return two divisors whose product is ``number``: ``factor`` first if it divides, else the smaller first.

    Args:
        number: the number to split.
        factor: upper limit of the smaller divisor; −1 for no limit.
    """
    if factor > 0 and number % factor == 0:
        return factor, number // factor
    limit = math.isqrt(number) if factor == -1 else min(math.isqrt(number), factor)
    small = next(d for d in range(max(limit, 1), 0, -1) if number % d == 0)
    return small, number // small


def _product(p: Params, stem: str, core: str) -> Tensor:
    """Return a matrix from its factors, with its core where it has one."""
    return multiply_factors(getattr(p, f"{stem}_a"), getattr(p, f"{stem}_b"), getattr(p, core, None))


@dataclass(frozen=True, kw_only=True)
class LoHa(ScaledRank, WeightVariant):
    """``W' = W + (alpha/r)·(A₁·B₁)∘(A₂·B₂)``, a change of rank up to r².

    FedPara: Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS: Yeh et al. 2023, arXiv 2309.14859; shapes and
    initialisation as in PEFT's LOHA.

    Attributes:
        r: rank of each product.
        effective_conv2d: PEFT's use_effective_conv2d: kernels of more than one tap are factored along all their axes,
            by cores ``hada_t1`` and ``hada_t2`` (r, r, taps).
    """

    effective_conv2d: bool = False

    name = "loha"
    paper = "FedPara: Low-Rank Hadamard Product, arXiv 2108.06098; LyCORIS, arXiv 2309.14859"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        out, r = site.out_features, self.r
        channels, taps = kernel_columns(site)
        if self.effective_conv2d and taps > 1:
            a, b = (r, out), (r, channels)
            cores = {name: ParamSpec((r, r, taps), uniform_core) for name in ("hada_t1", "hada_t2")}
        else:
            a, b, cores = (out, r), (r, channels * taps), {}
        return {
            "hada_w1_a": ParamSpec(a, kaiming_uniform),
            "hada_w1_b": ParamSpec(b, kaiming_uniform),
            "hada_w2_a": ParamSpec(a, kaiming_uniform),
            "hada_w2_b": ParamSpec(b, zeros),
            **cores,
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + expand_groups(
            self.scale * (_product(p, "hada_w1", "hada_t1") * _product(p, "hada_w2", "hada_t2")), W
        )
