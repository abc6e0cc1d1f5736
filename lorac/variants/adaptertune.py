"""AdapterTune: a GELU bottleneck with a residual after every k-th transformer block.

"AdapterTune: Zero-Initialized Low-Rank Adapters for Frozen Vision Transformers", 2026, arXiv 2603.14706.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from lorac.errors import ExampleInputsNeeded, not_one_of
from lorac.frontend.model_view import ModelView
from lorac.frontend.transformer_blocks import find_transformer_blocks
from lorac.ir.algebra.reduction import Params
from lorac.ir.patterns import find_outermost_blocks, is_named
from lorac.ir.sites import Site, SiteKind
from lorac.variants import _initialisers as _inits
from lorac.variants.base import BranchVariant, Context
from lorac.variants.params import ParamSpec

_UP_INITS = {"zero": _inits.zeros, "small": _inits.normal(1e-4)}


@dataclass(frozen=True, kw_only=True)
class AdapterTune(BranchVariant):
    """``y' = y + alpha·(U·GELU(D·y + p) + q)``, y (…, d) a block's output, D (r, d), U (d, r); exact (erf) GELU.

    Attributes:
        targets: blocks; the default is every transformer block of the network, found by structure: in a hierarchical
            one those of all its stages, and in a network without attention its outermost blocks.
        r: width of the bottleneck.
        alpha: factor of the branch.
        every: of the targeted blocks only those whose index is a multiple of this; block 0 always is.
        init: start of U and q: ``"zero"``, or ``"small"`` for N(0, 1e-4).
    """

    targets: str | tuple[str, ...] = "all-blocks"
    r: int = 16
    alpha: float = 1.0
    every: int = 1
    init: str = "zero"

    name: ClassVar[str] = "adaptertune"
    paper: ClassVar[str] = (
        "AdapterTune: Zero-Initialized Low-Rank Adapters for Frozen Vision Transformers, arXiv 2603.14706"
    )
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.BLOCK})

    def for_model(self, view: ModelView, inputs: object = None) -> AdapterTune:
        if self.targets != "all-blocks":
            return self
        try:
            blocks = find_transformer_blocks(view, inputs)
        except ExampleInputsNeeded:
            if _nested(view):  # which of the blocks inside one another are a transformer's, a run tells
                raise
            return self
        chosen = [b for n, b in enumerate(blocks) if n % self.every == 0 and (not self.layers or n in self.layers)]
        kept = tuple(path for path in chosen if not self.exclude or not is_named(self.exclude, path))
        return dataclasses.replace(self, targets=kept, every=1, layers=()) if kept else self

    def adapts(self, site: Site) -> bool:
        return site.number % self.every == 0

    def params(self, site: Site) -> dict[str, ParamSpec]:
        if self.init not in _UP_INITS:
            raise not_one_of("AdapterTune has no init", self.init, _UP_INITS)
        width, up = site.out_features, _UP_INITS[self.init]
        return {
            "down": ParamSpec((self.r, width), _inits.xavier_uniform),
            "down_bias": ParamSpec((self.r,), _inits.zeros),
            "up": ParamSpec((width, self.r), up),
            "up_bias": ParamSpec((width,), up),
        }

    def branch(self, x: torch.Tensor, y: torch.Tensor, p: Params, ctx: Context) -> torch.Tensor:
        hidden = F.gelu(F.linear(y, p.down, p.down_bias))
        return y + self.alpha * F.linear(hidden, p.up, p.up_bias)


def _nested(view: ModelView) -> bool:
    """Whether blocks of a model lie inside others."""
    blocks = {path for path, site in view.sites.items() if site.kind is SiteKind.BLOCK}
    return blocks != find_outermost_blocks(view.sites)
