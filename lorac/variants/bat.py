"""BAT: block affine transformation, the first version of Bone.

Kang 2024, arXiv 2409.15371v1; shapes and layout as in PEFT's MISS with init_weights="bat".
"""

from dataclasses import dataclass

import torch

from lorac.argument_types import Count
from lorac.variants._layer_sizes import require_divisor
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import zeros


@dataclass(frozen=True, kw_only=True)
class BAT(WeightVariant):
    """``W'ᵢⱼ = Wᵢⱼ·(I + Bᵢ) + Bᵢ`` on the r x r blocks of W, i the block of outputs, j the block of inputs.

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
