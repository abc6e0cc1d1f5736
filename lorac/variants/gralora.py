"""GraLoRA: low-rank changes of the blocks of a weight, and a low-rank change of the whole weight.

Jung et al. 2025, arXiv 2505.20355; layout and start values as in PEFT.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds, Count
from lorac.errors import OptionError
from lorac.variants._layer_shapes import require_divisor
from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import uniform, zeros
from lorac.variants.low_rank import InputDropout, peft_factor_specs


@dataclass(frozen=True, kw_only=True)
class GraLoRA(InputDropout, WeightVariant):
    """``W'_mn = W_mn + s·B_mn·A_mn`` on k·k blocks of W, ``+ s·B·A`` on all of W, s = alpha/(r + hybrid_r).

    Each A_mn has rank r/k: the transpose of A_mn is the columns from m·r/k on of gralora_A[n] (in/k, r), and the
    transpose of B_mn is the rows from n·r/k on of gralora_B[m] (r, out/k).

    Attributes:
        r: the sum of the ranks of the blocks in a row or column; a multiple of k.
        hybrid_r: rank of B·A; 0 omits it.
        alpha: the scale is alpha/(r + hybrid_r).
        k: PEFT's gralora_k; a divisor of in and out.
    """

    r: Count = 32
    hybrid_r: Annotated[int, Bounds(0)] = 0
    alpha: float = 64
    k: Count = 2

    name = "gralora"
    paper = "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning, arXiv 2505.20355"
    kinds = frozenset({SiteKind.LINEAR})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.k:
            raise OptionError(f"k={self.k} does not divide r={self.r}", next_step="give an r that is a multiple of k")

    def check(self, site: Site) -> None:
        super().check(site)
        require_divisor(site, "k", self.k)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        columns, rows = site.in_features // self.k, site.out_features // self.k
        specs = {
            "gralora_A": ParamSpec((self.k, columns, self.r), uniform(max(columns, 1) ** -0.5)),
            "gralora_B": ParamSpec((self.k, self.r, rows), zeros),
        }
        general = peft_factor_specs(site, self.hybrid_r, "gralora") if self.hybrid_r else {}
        return specs | {f"{name}_general": spec for name, spec in general.items()}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        eye = torch.eye(self.k, dtype=W.dtype, device=W.device)[:, None, :, None]
        up = (p.gralora_B.transpose(1, 2)[:, :, None] * eye).reshape(W.shape[0], -1)
        halves = p.gralora_A.unflatten(2, (self.k, -1)).permute(2, 0, 3, 1)
        change = up @ (halves[:, :, :, None] * eye).reshape(-1, W.shape[1])
        if self.hybrid_r:
            change = change + p.gralora_B_general @ p.gralora_A_general
        return W + self.alpha / (self.r + self.hybrid_r) * change
