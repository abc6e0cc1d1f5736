"""BD-LoRA: LoRA with one block-diagonal factor, of which processors in parallel need not exchange parts.

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

    The blocks stand one below the other: A (r, in/nblocks), B (out, r/nblocks).

    Attributes:
        target_modules_bd_a: parts of the names of modules with a block-diagonal A.
        target_modules_bd_b: parts of the names of modules with a block-diagonal B.
        nblocks: number of blocks; it divides both sides of the block-diagonal factor.
        match_strict: refuse modules with neither.
    """

    target_modules_bd_a: Sequence[str] = ()
    target_modules_bd_b: Sequence[str] = ()
    nblocks: Count = 1
    match_strict: bool = True

    name = "bd_lora"
    paper = (
        "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving, arXiv 2510.23346"
    )
    kinds = frozenset({SiteKind.LINEAR})

    def named_factors(self, path: str) -> list[bool]:
        """Return whether A and B are block-diagonal at a module; PEFT looks for parts of its last name."""
        leaf = path.rpartition(".")[2]
        named = (self.target_modules_bd_a, self.target_modules_bd_b)
        return [any(part in leaf for part in parts) for parts in named]

    def blocks_at(self, path: str) -> list[int]:
        """Return the numbers of blocks of A and of B at a module; 1 for a factor that is not block-diagonal."""
        return [self.nblocks if named else 1 for named in self.named_factors(path)]

    def check(self, site: Site) -> None:
        super().check(site)
        (of_a, of_b), named = self.blocks_at(site.path), sum(self.named_factors(site.path))
        uneven = self.r % of_a or site.in_features % of_a or self.r % of_b or site.out_features % of_b
        if named == 2 or uneven or (self.match_strict and not named):
            reason = (
                f"{self.nblocks} blocks do not divide its factor of rank {self.r}"
                if uneven
                else (
                    f"target_modules_bd_a and target_modules_bd_b name {'both' if named else 'neither'} of its factors"
                )
            )
            raise SiteError(
                f"BD-LoRA cannot adapt '{site.path}', {site.in_features} -> {site.out_features}: {reason}",
                next_step="name one factor of every module, or give match_strict=False",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        of_a, of_b = self.blocks_at(site.path)
        return {
            "lora_A": ParamSpec((self.r, site.in_features // of_a), kaiming_uniform),
            "lora_B": ParamSpec((site.out_features, self.r // of_b), zeros),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W + self.scale * (_expand(p.lora_B, self.r) @ _expand(p.lora_A, W.shape[1]))


def _expand(blocks: Tensor, columns: int) -> Tensor:
    """Return blocks that stand one below the other as a block-diagonal matrix with that many columns."""
    number = columns // blocks.shape[1]
    matrix: Tensor = torch.block_diag(*blocks.chunk(number)) if number > 1 else blocks
    return matrix
