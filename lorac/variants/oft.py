"""OFT: block-diagonal rotations of a layer's input.

Qiu et al. 2023, arXiv 2306.07280; the truncated series: Qiu et al. 2025 (OFTv2), arXiv 2506.19847.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds
from lorac.errors import OptionError, SiteError
from lorac.variants._decompositions import cayley, neumann, skew
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import zeros

_NAMES = ("oft_R", "oft_embedding_R")


def nearest_divisor(number: int, wanted: int) -> int:
    """Return the divisor of ``number`` nearest to ``wanted``; of two equally near, the lower (PEFT's rule)."""
    return min(divisors(number), key=lambda d: (abs(d - wanted), d))


def divisors(number: int) -> list[int]:
    """Return all divisors of a number, in order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


@dataclass(frozen=True, kw_only=True)
class OFT(WeightVariant):
    """``W' = W·Rᵀ``, R block-diagonal over the input; an embedding's rows are rotated instead, ``E' = E·R``.

    A block is ``(I − Q)·(I + Q)⁻¹``, or the series of ``neumann``, which approaches that block's *transpose*; Q is
    skew-symmetric, its upper triangle a row of oft_R (blocks, β(β−1)/2). Convolutions: the input is the unfolded
    (channels·kernel). Give block_size or r; it is rounded to the nearest divisor of the input.

    Attributes:
        block_size: β, PEFT's oft_block_size; 0 if r is given.
        r: number of blocks; 0 if block_size is given.
        block_share: whether all blocks are equal.
        use_cayley_neumann: whether the series replaces the inverse.
        num_cayley_neumann_terms: number of terms of the series, up to 100: every term is an op of the program.
        coft: whether Q's Frobenius norm is bounded by eps/√blocks; training writes the bounded oft_R, as PEFT does.
        eps: the bound of coft.
    """

    block_size: Annotated[int, Bounds(0)] = 32
    r: Annotated[int, Bounds(0)] = 0
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: Annotated[int, Bounds(1, 100)] = 5
    coft: bool = False
    eps: Annotated[float, Bounds(0)] = 6e-5

    name = "oft"
    paper = (
        "Controlling Text-to-Image Diffusion by Orthogonal Finetuning, arXiv 2306.07280; Orthogonal Finetuning Made "
        "Scalable, arXiv 2506.19847"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.r > 0) == (self.block_size > 0):
            raise OptionError(
                f"OFT takes a number of blocks or their size, not r={self.r} and block_size={self.block_size}",
                next_step="give one of the two, and 0 for the other",
            )

    def size(self, site: Site) -> int:
        """Return β at a site."""
        width = self._width(site)
        return nearest_divisor(width, self.block_size) if self.block_size else width // nearest_divisor(width, self.r)

    def check(self, site: Site) -> None:
        super().check(site)
        if self.size(site) == 1:
            width = self._width(site)
            found = ", ".join(map(str, divisors(width)[1:]))
            raise SiteError(
                f"OFT's blocks at '{site.path}' have size 1 and rotate nothing; {width} has "
                + (f"the divisors {found}" if found else "no divisor above 1"),
                next_step="give a block_size near a divisor, or add the module to exclude=",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        size, width = self.size(site), self._width(site)
        shape = (1 if self.block_share else width // size, size * (size - 1) // 2)
        return {_NAMES[site.kind is SiteKind.EMBEDDING]: ParamSpec(shape, zeros)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        if hasattr(p, "oft_embedding_R"):
            return self._rotate(W.t(), p.oft_embedding_R, transposed=False).t()
        return self._rotate(W, p.oft_R, transposed=True)

    def rotations(self, upper: Tensor) -> Tensor:
        """Return the blocks (blocks, β, β) of R from oft_R."""
        size = (1 + math.isqrt(1 + 8 * upper.shape[1])) // 2
        q = skew(self._bounded(upper) if self.coft else upper, size)
        return neumann(q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(q)

    def constrained(self, p: Params) -> dict[str, Tensor]:
        own = {name: tensor for name, tensor in vars(p).items() if self.coft and name in _NAMES}
        bounded = {name: self._bounded(tensor) for name, tensor in own.items()}
        # Rounding puts a bounded block slightly above or below the bound.
        slack = {name: 8 * torch.finfo(tensor.dtype).eps for name, tensor in own.items()}
        return {n: t for n, t in bounded.items() if not torch.allclose(t, own[n], rtol=slack[n], atol=0)}

    def _bounded(self, upper: Tensor) -> Tensor:
        """Scale oft_R (…, blocks, β(β−1)/2) so that the Frobenius norm of each block's Q is at most eps/√blocks."""
        cap = self.eps / math.sqrt(2 * upper.shape[-2])  # Q contains every number twice
        norm = torch.linalg.vector_norm(upper, dim=-1, keepdim=True)
        return upper * (cap / norm.clamp_min(cap)).detach()

    def _rotate(self, rows: Tensor, upper: Tensor, *, transposed: bool) -> Tensor:
        """Return rows (n, width) times R, or times Rᵀ."""
        blocks = self.rotations(upper)
        size = blocks.shape[-1]
        repeated = blocks.expand(rows.shape[1] // size, size, size)
        return rows @ torch.block_diag(*(repeated.transpose(1, 2) if transposed else repeated))

    @staticmethod
    def _width(site: Site) -> int:
        return site.out_features if site.kind is SiteKind.EMBEDDING else site.in_features
