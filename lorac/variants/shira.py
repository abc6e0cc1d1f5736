"""SHiRA: sparse high-rank adapters.

Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorac.ir.sites import Site
from lorac.ir.types import Params, ParamSpec, Role
from lorac.variants import _inits, _masks
from lorac.variants.base import WeightVariant


@dataclass(frozen=True, kw_only=True)
class SHiRA(WeightVariant):
    """``W' = W + S``, S holding K trained values at fixed positions.

    Attributes:
        r: PEFT's size knob: K = r·(out + in). It does not bound the rank.
        ratio: the paper's: K = round(ratio·out·in). Takes precedence over r.
        mask: which positions: ``"random"``, ``"magnitude"``, ``"struct"``, or a maker from
            ``lorac.variants.masks``-style callables (``gradient_mask``, ``snip_mask``): InitContext -> (2, K).
        seed: folded with the adapter's and the site's name into the random mask.
    """

    r: int = 32
    ratio: float | None = None
    mask: str | _masks.MaskMaker = "random"

    name: ClassVar[str] = "shira"
    paper: ClassVar[str] = "Sparse High Rank Adapters, arXiv 2406.13175"

    def entries(self, site: Site) -> int:
        """K, the number of trained values at ``site``."""
        out, columns = site.out_features, site.in_features
        return self.r * (out + columns) if self.ratio is None else round(self.ratio * out * columns)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        maker = _masks.maker(self.mask, self.entries(site))
        entries = maker.entries(site)
        return {
            "indices": ParamSpec((2, entries), maker.make, role=Role.INDEX),
            "values": ParamSpec((entries,), _inits.zeros, decay=False),
        }

    def weight(self, W: torch.Tensor, p: Params) -> torch.Tensor:
        return torch.index_put(W, (p.indices[0], p.indices[1]), p.values, accumulate=True)
