"""BOFT: rotations of a layer's input or output as a product of butterfly factors.

Liu et al. 2023, arXiv 2311.06243; rotated outputs as in LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS), whose
"diag-oft" is one factor.
"""

from dataclasses import dataclass
from typing import Annotated

from lorac.argument_types import Bounds, Count
from lorac.errors import OptionError, SiteError
from lorac.variants._decompositions import cayley
from lorac.variants.base import MATRIX_KINDS, Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import ones, zeros


@dataclass(frozen=True, kw_only=True)
class BOFT(WeightVariant):
    """``W' = diag(s)·W·Rᵀ`` with ``R = F_{m−1} ⋯ F₁·F₀`` and ``Fᵢ = Pᵢ·blockdiag(…)·Pᵢᵀ``; the bias is not scaled.

    A block is ``(I − S)·(I + S)⁻¹`` with ``S = (X − Xᵀ)/2``, X a block of boft_R (m, blocks, β, β). Pᵢ reorders each
    group of 2ⁱ blocks, cut into units of β/2: the even units, then the odd ones. s is boft_s (out, 1).

    Attributes:
        block_size: β, PEFT's boft_block_size; 0 if block_num is given.
        block_num: number of blocks; 0 if block_size is given.
        n_butterfly_factor: m.
        rotates_output: ``W' = diag(s)·R·W`` instead; the bias is not rotated.
    """

    block_size: Annotated[int, Bounds(0)] = 4
    block_num: Annotated[int, Bounds(0)] = 0
    n_butterfly_factor: Count = 1
    rotates_output: bool = False

    name = "boft"
    paper = "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization, arXiv 2311.06243"
    kinds = MATRIX_KINDS - {SiteKind.EMBEDDING}

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.block_num > 0) == (self.block_size > 0):
            raise OptionError(
                f"BOFT takes a number of blocks or their size, not block_num={self.block_num} and "
                f"block_size={self.block_size}",
                next_step="give one of the two, and 0 for the other",
            )

    def check(self, site: Site) -> None:
        super().check(site)
        width, m = self._width(site), self.n_butterfly_factor
        size, number = self._blocks(site)
        group = 2 ** min(m - 1, number.bit_length())  # no higher power divides the number
        if width % (divisor := self.block_size or self.block_num):
            problem = f"{divisor} does not divide"
        elif m > 1 and (size % 2 or number % group):
            problem = f"{m} factors need an even block size and a multiple of {group} blocks, of"
        else:
            return
        raise SiteError(
            f"BOFT cannot cut the {'output' if self.rotates_output else 'input'} of '{site.path}': {problem} {width} "
            "features",
            next_step="give another block_size or block_num, or add the module to exclude=",
        )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        size, number = self._blocks(site)
        return {
            "boft_R": ParamSpec((self.n_butterfly_factor, number, size, size), zeros),
            "boft_s": ParamSpec((site.out_features, 1), ones),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        rows = W.t() if self.rotates_output else W
        for i, x in enumerate(p.boft_R):
            blocks = cayley(0.5 * (x - x.transpose(1, 2)))
            group = 2**i
            number, size, _ = blocks.shape
            count, width = rows.shape
            groups = number // group
            # Columns of a group: (parity, pair of units, position) outside, (pair, parity, position) inside.
            units = rows.reshape(count, groups, 2, group, size // 2).transpose(2, 3) if group > 1 else rows
            rotated = (units.reshape(count, number, size).transpose(0, 1) @ blocks.transpose(1, 2)).transpose(0, 1)
            if group > 1:
                rotated = rotated.reshape(count, groups, group, 2, size // 2).transpose(2, 3)
            rows = rotated.reshape(count, width)
        return p.boft_s * (rows.t() if self.rotates_output else rows)

    def _width(self, site: Site) -> int:
        return site.out_features if self.rotates_output else site.in_features

    def _blocks(self, site: Site) -> tuple[int, int]:
        """Return the size and the number of the blocks."""
        width = self._width(site)
        size = self.block_size or width // self.block_num
        return size, self.block_num or width // size
