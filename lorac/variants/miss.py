"""MiSS, one shard of trained values that all shards of the input share, and BAT, its first version.

Kang 2024, arXiv 2409.15371, later versions (the first one, Bone, is ``BAT``); shapes and layout as in PEFT's MISS.
"""

from dataclasses import dataclass

import torch

from lorac.argument_types import Count
from lorac.variants._layer_shapes import require_at_most, require_divisor
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import zeros
from lorac.variants.low_rank import InputDropout


@dataclass(frozen=True, kw_only=True)
class MiSS(InputDropout, WeightVariant):
    """``W' = W + Dᵀ·F`` with D (r, out) trained and F = [I_r I_r …] (r, in), its last block cut: rank r, half of LoRA.

    Attributes:
        r: size of a shard of the input.
        mini: whether D = [M M …], with M (r, mini_r) trained; PEFT's init_weights="mini".
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
        require_at_most(site, "r", self.r, site.in_features)
        if self.mini:
            require_divisor(site, "mini_r", self.mini_r, outputs=True)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"miss_block": ParamSpec((self.r, self.mini_r if self.mini else site.out_features), zeros)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        out, columns = W.shape
        block = p.miss_block.repeat(1, out // self.mini_r) if self.mini else p.miss_block
        shards = -(-columns // self.r)
        # new_ones, not torch.eye: the formula runs on the device of its tensors.
        identity = torch.diag_embed(block.new_ones(self.r))
        return W + block.t() @ identity.repeat(1, shards)[:, :columns]


@dataclass(frozen=True, kw_only=True)
class BAT(WeightVariant):
    """``W'ᵢⱼ = Wᵢⱼ·(I + Bᵢ) + Bᵢ`` on the r x r blocks of W, i the block of outputs, j the block of inputs.

    BAT: block affine transformation, the first version of Bone. Kang 2024, arXiv 2409.15371v1; shapes and layout as in
    PEFT's MISS with init_weights="bat".

    The change depends on W and has full rank, so that it is merged, or W' is bound as a whole weight.

    Attributes:
        r: size of a block; divides both out and in.
    """

    r: Count = 64

    name = "bat"
    paper = "Bone: Block Affine Transformation as PEFT Methods for LLMs, arXiv 2409.15371v1"
    kinds = frozenset({SiteKind.LINEAR})

    def check(self, site: Site) -> None:
        super().check(site)
        require_divisor(site, "r", self.r)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"miss_block": ParamSpec((site.out_features // self.r, self.r, self.r), zeros)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        count, r, _ = p.miss_block.shape
        products = torch.bmm(W.reshape(count, -1, r), p.miss_block).reshape(count, r, -1, r)
        return W + (products + p.miss_block[:, :, None]).reshape(W.shape)
