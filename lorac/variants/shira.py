"""SHiRA: sparse high-rank adapters.

Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lorac.errors import SiteError
from lorac.variants._masks import (
    MaskMaker,
    find_mask_maker,
    gradient_mask,
    magnitude_mask,
    random_mask,
    snip_mask,
    struct_mask,
)
from lorac.variants.base import Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import zeros

__all__ = ["MaskMaker", "SHiRA", "gradient_mask", "magnitude_mask", "random_mask", "snip_mask", "struct_mask"]


@dataclass(frozen=True, kw_only=True)
class SHiRA(WeightVariant):
    """``W' = W + S``, S holding K trained values at fixed positions.

    Attributes:
        r: PEFT's size setting: K = r·(out + in). It does not bound the rank.
        ratio: the paper's setting: K = round(ratio·out·in). It overrides r.
        mask: the positions: ``"random"`` (different per adapter and site), ``"magnitude"``, or the result of
            ``random_mask``, ``magnitude_mask``, ``gradient_mask``, ``snip_mask`` or ``struct_mask`` of this module.
    """

    r: int = 32
    ratio: float | None = None
    mask: str | MaskMaker = "random"

    name = "shira"
    paper = "Sparse High Rank Adapters, arXiv 2406.13175"

    def entries(self, site: Site) -> int:
        """Return the number K of trained values at ``site``."""
        out, columns = site.out_features, site.in_features
        return self.r * (out + columns) if self.ratio is None else round(self.ratio * out * columns)

    def check(self, site: Site) -> None:
        super().check(site)
        entries, size = (
            find_mask_maker(self.mask, self.entries(site)).entries(site),
            site.out_features * site.in_features,
        )
        if entries > size:
            raise SiteError(
                f"SHiRA cannot train {entries} positions of '{site.path}', which has {size}",
                nearest=f"r={size // (site.out_features + site.in_features)}",
                next_step="give a smaller r or ratio",
                code="site_unsupported",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        chosen = find_mask_maker(self.mask, self.entries(site))
        entries, shape = chosen.entries(site), (site.out_features, site.in_features)
        return {
            "indices": ParamSpec((2, entries), chosen.make, role=Role.INDEX, below=shape),
            "values": ParamSpec((entries,), zeros, decay=False),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return torch.index_put(W, (p.indices[0], p.indices[1]), p.values, accumulate=True)
