"""MPS adaptation: LoRA whose A is a matrix product state of two sites.

Chen et al. 2026, arXiv 2601.06788. The paper gives no code or start values: here the entries of A have the variance of
LoRA's entries.
"""

import math
from dataclasses import dataclass
from typing import Annotated

from lorac.argument_types import Bounds, Count, OneOf
from lorac.errors import SiteError
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import normal, zeros
from lorac.variants.low_rank import LowRankFields


@dataclass(frozen=True, kw_only=True)
class MPS(LowRankFields, WeightVariant):
    """``W' = W + s·B·A, A[p, a·d2 + b] = Σ_k G1[p, a, k]·G2[k, b]``, with s = alpha/r and in = d1·d2.

    G1 (r, d1, chi), G2 (chi, d2), B (out, r). With the rank on the last core, G1 (d1, chi), G2 (chi, d2, r). Every A
    can be represented if chi ≥ d2 with the rank on the first core, or chi ≥ d1 with the rank on the last.

    Attributes:
        chi: bond dimension.
        dims: (d1, d2), whose product is the input size of every targeted layer. None: each layer's most even split,
            with the smaller size on the core that has the rank.
        rank_leg: the core that has the rank, ``"first"`` or ``"last"``.
    """

    chi: Count = 8
    dims: Annotated[tuple[int, ...] | None, Bounds(1)] = None
    rank_leg: Annotated[str, OneOf(("first", "last"))] = "first"

    name = "mps"
    paper = "Artificial Entanglement in the Fine-Tuning of Large Language Models, arXiv 2601.06788"
    kinds = frozenset({SiteKind.LINEAR})

    def split(self, site: Site) -> tuple[int, ...]:
        """Return (d1, d2) at ``site``."""
        if self.dims is not None:
            return self.dims
        size = site.in_features
        small = next(d for d in range(math.isqrt(size), 0, -1) if size % d == 0)
        return (small, size // small) if self.rank_leg == "first" else (size // small, small)

    def check(self, site: Site) -> None:
        super().check(site)
        dims = self.split(site)
        if len(dims) != 2 or math.prod(dims) != site.in_features:
            raise SiteError(
                f"mps splits its input into {' x '.join(map(str, dims))}; '{site.path}' has {site.in_features}",
                next_step="give two dims whose product is that, or none for the most even split",
            )

    def params(self, site: Site) -> dict[str, ParamSpec]:
        d1, d2 = self.split(site)
        core = normal((3 * site.in_features * self.chi) ** -0.25)
        first, last = ((self.r,), ()) if self.rank_leg == "first" else ((), (self.r,))
        return {
            "mps_g1": ParamSpec((*first, d1, self.chi), core),
            "mps_g2": ParamSpec((self.chi, d2, *last), core),
            "lora_B": ParamSpec((site.out_features, self.r), zeros),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        product = p.mps_g1.flatten(0, -2) @ p.mps_g2.flatten(1)
        a = product.reshape(self.r, -1) if self.rank_leg == "first" else product.reshape(-1, self.r).t()
        return W + self.scale * (p.lora_B @ a)
