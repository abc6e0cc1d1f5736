"""BD-LoRA: LoRA with one block-diagonal factor, whose parts parallel processors need not exchange.

Wang et al. 2025, arXiv 2510.23346; layout as in PEFT's LORA with use_bdlora.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lorac.argument_types import Count
from lorac.errors import SiteError
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import kaiming_uniform, zeros
from lorac.variants.low_rank import RankStabilizedFields


@dataclass(frozen=True, kw_only=True)
class BDLoRA(RankStabilizedFields, WeightVariant):
    """``W' = W + s·B·A`` with A, B or neither block-diagonal, and s as for LoRA.

    The blocks are concatenated by rows: A (r, in/nblocks), B (out, r/nblocks).

    Attributes:
        target_modules_bd_a: parts of the names of modules with a block-diagonal A.
        target_modules_bd_b: parts of the names of modules with a block-diagonal B.
        nblocks: number of blocks; it divides both sides of the block-diagonal factor.
        match_strict: whether modules in neither list are refused.
    """

    target_modules_bd_a: Sequence[str] = ()
    target_modules_bd_b: Sequence[str] = ()
    nblocks: Count = 1
    match_strict: bool = False

    name = "bd_lora"
    paper = (
        "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving, arXiv 2510.23346"
    )
    kinds = frozenset({SiteKind.LINEAR})

    def blocks_at(self, path: str) -> list[int]:
        """Return the numbers of blocks of A and of B at a module; 0 for a factor that is not block-diagonal.

        PEFT searches the parts in the last component of a module's path.
        """
        leaf, named = path.rpartition(".")[2], (self.target_modules_bd_a, self.target_modules_bd_b)
        return [self.nblocks * any(part in leaf for part in parts) for parts in named]

    def check(self, site: Site) -> None:
        super().check(site)
        of_a, of_b = self.blocks_at(site.path)
        uneven = any(size % self.nblocks for size in (self.r, site.in_features if of_a else site.out_features))
        if (of_a and of_b) or (self.match_strict and not of_a + of_b) or ((of_a or of_b) and uneven):
            raise SiteError(
                f"BD-LoRA cuts one factor of '{site.path}', {site.in_features} -> {site.out_features} by r={self.r}, "
                f"into {self.nblocks} blocks; here it would cut A into {of_a} and B into {of_b}",
                next_step="name the module in one of target_modules_bd_a and target_modules_bd_b, and give an nblocks "
                "that divides the factor",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        of_a, of_b = self.blocks_at(site.path)
        return {
            "lora_A": ParamSpec((self.r, site.in_features // (of_a or 1)), kaiming_uniform),
            "lora_B": ParamSpec((site.out_features, self.r // (of_b or 1)), zeros),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + self.scale * (_expand(p.lora_B, self.r) @ _expand(p.lora_A, W.shape[1]))


def _expand(blocks: Tensor, columns: int) -> Tensor:
    """Expand blocks that are concatenated by rows to a block-diagonal matrix with ``columns`` columns."""
    number = columns // blocks.shape[1]
    matrix: Tensor = torch.block_diag(*blocks.chunk(number)) if number > 1 else blocks
    return matrix
