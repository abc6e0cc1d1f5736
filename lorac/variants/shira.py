"""SHiRA: sparse high-rank adapters.

Bhardwaj et al., NeurIPS 2024, arXiv 2406.13175.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds, Count, OneOf
from lorac.errors import OptionError, SiteError
from lorac.variants._masks import (
    NAMED_MASKS,
    MaskMaker,
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
    """``W' = W + S``, where S has K trained values at fixed positions.

    Attributes:
        r: PEFT's size setting: K = r·(out + in). It does not bound the rank.
        ratio: the paper's setting: K = round(ratio·out·in). It overrides r.
        mask: the positions: ``"random"`` (different per adapter and site), ``"magnitude"``, or the result of
            ``random_mask``, ``magnitude_mask``, ``gradient_mask``, ``snip_mask`` or ``struct_mask`` of this module; the
                last decides K.
    """

    r: Count = 32
    ratio: Annotated[float | None, Bounds(0, 1, exclusive=True)] = None
    mask: Annotated[str | MaskMaker, OneOf(tuple(NAMED_MASKS), ", or a mask such as shira.snip_mask(…) makes")] = (
        "random"
    )

    name = "shira"
    paper = "Sparse High Rank Adapters, arXiv 2406.13175"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [f"{name}={getattr(self, name)}" for name in ("r", "ratio") if getattr(self, name) != _DEFAULTS[name]]
        if self._maker.entries is not None and given:
            raise OptionError(
                f"the mask gives the number of positions itself, and {' and '.join(given)} would give another",
                next_step="leave r= and ratio= out, or give a mask that chooses any number, such as snip_mask",
            )

    @property
    def _maker(self) -> MaskMaker:
        return self.mask if isinstance(self.mask, MaskMaker) else NAMED_MASKS[self.mask]

    def entries(self, site: Site) -> int:
        """Return the number K of trained values at ``site``."""
        if self._maker.entries is not None:
            return self._maker.entries(site)
        out, columns = site.out_features, site.in_features
        return self.r * (out + columns) if self.ratio is None else round(self.ratio * out * columns)

    def check(self, site: Site) -> None:
        super().check(site)
        entries, size = self.entries(site), site.out_features * site.in_features
        if entries > size:
            raise SiteError(
                f"SHiRA cannot train {entries} positions of '{site.path}', which has {size}",
                nearest=f"r={size // (site.out_features + site.in_features)}",
                next_step="give a smaller r or ratio",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        entries, shape = self.entries(site), (site.out_features, site.in_features)
        return {
            "indices": ParamSpec((2, entries), self._maker.make, role=Role.INDEX, below=shape),
            "values": ParamSpec((entries,), zeros, decay=False),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return torch.index_put(W, (p.indices[0], p.indices[1]), p.values, accumulate=True)


_DEFAULTS = {"r": SHiRA.r, "ratio": SHiRA.ratio}
