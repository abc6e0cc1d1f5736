"""MiSS: one shard of trained values, shared by all shards of the input.

Kang 2024, arXiv 2409.15371, later versions (the first one, Bone, is ``bat``); shapes and layout as in PEFT's MISS.
"""

import math
from dataclasses import dataclass

import torch

from lorac.argument_types import Count
from lorac.errors import SiteError
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import zeros
from lorac.variants.low_rank import InputDropout


@dataclass(frozen=True, kw_only=True)
class MiSS(InputDropout, WeightVariant):
    """``W' = W + Dᵀ·F`` with D (r, out) trained and F = [I_r I_r …] (r, in), its last block cut: rank r, half of LoRA.

    Attributes:
        r: size of a shard of the input.
        mini: D = [M M …], with M (r, mini_r) trained; PEFT's init_weights="mini".
        mini_r: columns of M, which divide out; used only with ``mini``.
    """

    r: Count = 64
    mini: bool = False
    mini_r: Count = 1

    name = "miss"
    paper = "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing, arXiv 2409.15371"
    kinds = frozenset({SiteKind.LINEAR})

    def check(self, site: Site) -> None:
        super().check(site)
        if self.r > site.in_features:
            raise SiteError(
                f"MiSS cannot split the {site.in_features} inputs of '{site.path}' into shards of r={self.r}",
                nearest=f"r={site.in_features}",
                next_step="give a smaller r, or exclude= the module",
            )
        if self.mini and site.out_features % self.mini_r:
            raise SiteError(
                f"mini_r={self.mini_r} does not divide the {site.out_features} outputs of '{site.path}'",
                nearest=f"mini_r={math.gcd(site.out_features, self.mini_r)}",
                next_step="give another mini_r, or exclude= the module",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"miss_block": ParamSpec((self.r, self.mini_r if self.mini else site.out_features), zeros)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        out, columns = W.shape
        block = p.miss_block.repeat(1, out // self.mini_r) if self.mini else p.miss_block
        shards = -(-columns // self.r)
        # new_ones, not torch.eye: the formula runs on the device of its tensors.
        identity = torch.diag_embed(block.new_ones(self.r))
        return W + block.t() @ identity.repeat(1, shards)[:, :columns]
