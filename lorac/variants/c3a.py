"""C3A: a change of circulant blocks, each a convolution with a trained vector.

Chen et al. 2024, arXiv 2407.19342; orientation, scale and start values as in PEFT.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from lorac.argument_types import Count
from lorac.variants._layer_shapes import require_divisor
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import uniform


@dataclass(frozen=True, kw_only=True)
class C3A(WeightVariant):
    """``W' = W + C/in``, C of blocks (β, β) with ``C_mn[i, j] = k_mn[(j − i) mod β]``, k (out/β, in/β, β).

    The vectors have Xavier's uniform start values, so that a fresh adapter changes the output.

    Attributes:
        block_size: β; it divides in and out.
        block_size_pattern: module pattern -> block_size of these modules.
    """

    block_size: Count = 256
    block_size_pattern: Mapping[str, int] = field(default_factory=dict)

    name = "c3a"
    paper = "Parameter-Efficient Fine-Tuning via Circular Convolution, arXiv 2407.19342"
    kinds = frozenset({SiteKind.LINEAR})
    identity_at_init = False
    patterned: ClassVar[Mapping[str, str]] = {"block_size_pattern": "block_size"}

    def check(self, site: Site) -> None:
        super().check(site)
        require_divisor(site, "block_size", self.block_size)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        shape = (site.out_features // self.block_size, site.in_features // self.block_size, self.block_size)
        return {"c3a_kernel": ParamSpec(shape, uniform(math.sqrt(6 / (site.out_features + site.in_features))))}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        places = torch.arange(p.c3a_kernel.shape[2], device=W.device)
        blocks = p.c3a_kernel[:, :, (places - places[:, None]) % p.c3a_kernel.shape[2]]
        return W + blocks.transpose(1, 2).reshape(W.shape) / W.shape[1]
