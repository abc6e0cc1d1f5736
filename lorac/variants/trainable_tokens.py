"""Trainable tokens: trains a few rows of an embedding, such as those of new tokens.

PEFT's TRAINABLE_TOKENS (https://huggingface.co/docs/peft/package_reference/trainable_tokens).
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds
from lorac.variants.base import Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(WeightVariant):
    """``W'[:, t] = P`` for some tokens t of an embedding W (d, V), P (d, n); of an output layer (V, d) ``W'[t] = Pᵀ``.

    Attributes:
        token_indices: the tokens' indices, without duplicates.
    """

    token_indices: Annotated[tuple[int, ...], Bounds(0, torch.iinfo(torch.int64).max)]

    name = "trainable_tokens"
    kinds = frozenset({SiteKind.EMBEDDING, SiteKind.LINEAR})

    def params(self, site: Site) -> dict[str, ParamSpec]:
        count, dim = len(self.token_indices), 1 if site.kind is SiteKind.EMBEDDING else 0
        name, shape = ("columns", (site.out_features, count)) if dim else ("rows", (count, site.in_features))
        below = (site.in_features if dim else site.out_features,)
        return {
            "index": ParamSpec((1, count), lambda _: torch.tensor([self.token_indices]), Role.INDEX, below=below),
            name: ParamSpec(shape, lambda c: c.weight().index_select(dim, torch.tensor(self.token_indices))),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        if "columns" in vars(p):
            return W.index_copy(1, p.index[0], p.columns)
        return W.index_copy(0, p.index[0], p.rows)
