"""BEFT: a trained vector is added to the bias.

Bias-Efficient Fine-Tuning, 2025, arXiv 2509.15974; layout as in PEFT.
"""

from dataclasses import dataclass

from lorac.variants.base import Params, ParamSpec, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import zeros


@dataclass(frozen=True, kw_only=True)
class BEFT(WeightVariant):
    """``W' = W`` and ``b' = b + β``, with β (1, out). The paper targets only value projections."""

    name = "beft"
    paper = "BEFT: Bias-Efficient Fine-Tuning of Language Models in Low-Data Regimes, arXiv 2509.15974"
    kinds = frozenset({SiteKind.LINEAR})

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"beft_bias": ParamSpec((1, site.out_features), zeros, decay=False)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W

    def new_bias(self, b: Tensor, p: Params) -> Tensor:
        return b + p.beft_bias[0]
