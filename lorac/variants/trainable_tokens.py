"""Trainable tokens: trains a few rows of an embedding, such as those of new tokens.

PEFT's TRAINABLE_TOKENS (https://huggingface.co/docs/peft/package_reference/trainable_tokens).
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds
from lorac.frontend.model_view import ModelView
from lorac.variants.base import InitContext, Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(WeightVariant):
    """``W'[:, t] = P`` for some tokens t of an embedding W (d, V), P (d, n); of an output layer (V, d) ``W'[t] = Pᵀ``.

    A layer tied to a targeted embedding is adapted too: both share one tensor Pᵀ (n, d), as in PEFT.

    Attributes:
        token_indices: the tokens' indices, without duplicates.
        tied: whether layers are tied to the embeddings; set by ``for_model``.
    """

    token_indices: Annotated[tuple[int, ...], Bounds(0, torch.iinfo(torch.int64).max)]
    tied: bool = False

    name = "trainable_tokens"
    kinds = frozenset({SiteKind.EMBEDDING, SiteKind.LINEAR})

    def for_model(self, view: ModelView, inputs: object = None) -> "TrainableTokens":
        """Add the layers that are tied to the method's embeddings to its targets; return the method."""
        named = self.named_sites(view)
        shares = [path for site in named if site.kind is SiteKind.EMBEDDING for path in site.shares]
        if not shares:
            return self
        targets = tuple(dict.fromkeys([*(site.path for site in named), *shares]))
        return dataclasses.replace(self, targets=targets, exclude=(), layers=(), tied=True)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        count, embeds = len(self.token_indices), site.kind is SiteKind.EMBEDDING
        size, width = (site.in_features, site.out_features) if embeds else (site.out_features, site.in_features)
        name, axis = ("columns", 1) if embeds and not self.tied else ("tied_rows" if embeds else "rows", 0)
        tie = min(site.path, *site.shares) if self.tied and site.shares else ""

        def initialise(context: InitContext) -> Tensor:
            weight = context.weight().t() if name == "tied_rows" else context.weight()
            return weight.index_select(axis, torch.tensor(self.token_indices))

        shape = (width, count) if axis else (count, width)
        index = ParamSpec((1, count), lambda _: torch.tensor([self.token_indices]), Role.INDEX, below=(size,))
        return {"index": index, name: ParamSpec(shape, initialise, tie=tie)}

    def hold_rows(self, site: Site, rows: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a site that hold the rows (n, d)."""
        name = next(name for name in self.params(site) if name != "index")
        return {"index": torch.tensor([self.token_indices]), name: rows.t() if name == "columns" else rows}

    def weight(self, W: Tensor, p: Params) -> Tensor:
        if "rows" in vars(p):
            return W.index_copy(0, p.index[0], p.rows)
        return W.index_copy(1, p.index[0], p.columns if "columns" in vars(p) else p.tied_rows.t())


def rows_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the rows (n, d) in a site's tensors; the inverse of ``TrainableTokens.hold_rows``."""
    [rows] = (tensor.t() if name == "columns" else tensor for name, tensor in tensors.items() if name != "index")
    return rows
