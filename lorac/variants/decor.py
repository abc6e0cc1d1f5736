"""DECOR: text embeddings are projected off the span of unwanted words' embeddings, in the text encoder.

"DECOR: Decomposition and Projection of Text Embeddings for Text-to-Image Customization", Jang et al. 2024, arXiv
2412.09169. Nothing is trained. There is no public code; lorac's reading decides which rows are projected
(``lorac.diffusion.decor``).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lorac.argument_types import Count
from lorac.variants.base import BranchVariant, Context, Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import ones, zeros


@dataclass(frozen=True, kw_only=True)
class DECOR(BranchVariant):
    """``y' = y − k∘(y·V·Vᵀ)`` for a prompt's embeddings y (…, length, d): DECOR at the text encoder's last norm.

    The columns of V (d, r) span the embeddings of unwanted words; each has the length √α, and a column of zeros
    projects nothing. k (tokens,) is 1 where a token is projected, else 0. Both are buffers, so that each prompt's
    values are written between calls. The output of a text encoder's LoRA is projected too, and all readers of the norm
    read projected values, such as CLIP's pooled embedding.

    Attributes:
        targets: the text encoder's last norm.
        r: the largest number of columns.
        tokens: the largest length of a prompt.
    """

    targets: str | Sequence[str] = ("final_layer_norm",)
    r: Count
    tokens: Count

    name = "decor"
    paper = "DECOR: Decomposition and Projection of Text Embeddings for Text-to-Image Customization, arXiv 2412.09169"
    kinds = frozenset({SiteKind.BLOCK})

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            "span": ParamSpec((site.out_features, self.r), zeros, Role.BUFFER),
            "rows": ParamSpec((self.tokens,), ones, Role.BUFFER),
        }

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        return y - p.rows[: y.shape[-2], None] * (y @ p.span @ p.span.mT)


@dataclass(frozen=True, kw_only=True)
class DECORWeight(WeightVariant):
    """``W' = W − W·V·Vᵀ``: ``DECOR`` for one V, in the layers that read the embeddings, for every token.

    DECOR's projection merged into layers that read embeddings, arXiv 2412.09169.

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
