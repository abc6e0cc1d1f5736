"""Trainable tokens: a few rows of an embedding trained, such as those of tokens that are new.

PEFT's TRAINABLE_TOKENS (https://huggingface.co/docs/peft/package_reference/trainable_tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site, SiteKind
from lorac.variants.base import WeightVariant
from lorac.variants.params import Init, InitContext, ParamSpec, Role

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(WeightVariant):
    """``W'[:, t] = P`` for some tokens t of an embedding W (d, V), P (d, n); of an output layer (V, d) ``W'[t] = Pᵀ``.

    Attributes:
        token_indices: numbers of the tokens, each once.
    """

    token_indices: tuple[int, ...]

    name: ClassVar[str] = "trainable_tokens"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.EMBEDDING, SiteKind.LINEAR})

    def params(self, site: Site) -> dict[str, ParamSpec]:
        count, dim = len(self.token_indices), 1 if site.kind is SiteKind.EMBEDDING else 0
        name, shape = ("columns", (site.out_features, count)) if dim else ("rows", (count, site.in_features))
        below = (site.in_features if dim else site.out_features,)
        return {
            "index": ParamSpec((1, count), self._index, Role.INDEX, below=below),
            name: ParamSpec(shape, self._taken(dim)),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        if "columns" in vars(p):
            return W.index_copy(1, p.index[0], p.columns)
        return W.index_copy(0, p.index[0], p.rows)

    def _index(self, context: InitContext) -> Tensor:
        return torch.tensor([self.token_indices], dtype=torch.int64)

    def _taken(self, dim: int) -> Init:
        """The base's own."""

        def made(context: InitContext) -> Tensor:
            return context.weight().index_select(dim, torch.tensor(self.token_indices))

        return made
