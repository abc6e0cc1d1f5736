"""DECOR's projection merged into layers that read embeddings: arXiv 2412.09169, see ``lorac.variants.decor``."""

from collections.abc import Sequence
from dataclasses import dataclass

from lorac.argument_types import Count
from lorac.variants.base import Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import zeros


@dataclass(frozen=True, kw_only=True)
class DECORWeight(WeightVariant):
    """``W' = W − W·V·Vᵀ``: ``DECOR`` for one V, in the layers that read the embeddings, for every token.

    The columns of V (in, r) span the embeddings of unwanted words, each with the length √α. To combine it with a LoRA
    on the same layers, use ``lorac.Chain``, not a sum, since the LoRA's input must be projected too.

    Attributes:
        targets: cross-attention's keys and values.
        r: the number of columns.
    """

    targets: str | Sequence[str] = ("attn2.to_k", "attn2.to_v")
    r: Count

    name = "decor_weight"
    paper = "DECOR: Decomposition and Projection of Text Embeddings for Text-to-Image Customization, arXiv 2412.09169"
    kinds = frozenset({SiteKind.LINEAR})

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"span": ParamSpec((site.in_features, self.r), zeros, Role.FROZEN)}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        return W - W @ p.span @ p.span.mT
