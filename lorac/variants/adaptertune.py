"""AdapterTune: a GELU bottleneck with a residual after every k-th transformer block.

"AdapterTune: Zero-Initialized Low-Rank Adapters for Frozen Vision Transformers", 2026, arXiv 2603.14706.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F

from lorac.argument_types import Count, OneOf
from lorac.errors import ExampleInputsNeeded
from lorac.frontend.model_view import ModelView
from lorac.frontend.transformer_blocks import find_transformer_blocks
from lorac.ir.sites.patterns import find_outermost_blocks, is_named
from lorac.variants.base import BranchVariant, Context, Params, ParamSpec, Site, SiteKind, Tensor
from lorac.variants.initialisers import normal, xavier_uniform, zeros

_UP_INITS = {"zero": zeros, "small": normal(1e-4)}


@dataclass(frozen=True, kw_only=True)
class AdapterTune(BranchVariant):
    """``y' = y + alpha·(U·GELU(D·y + p) + q)``, y (…, d) a block's output, D (r, d), U (d, r); exact (erf) GELU.

    Attributes:
        targets: blocks; by default every transformer block of the network, found by structure. In a hierarchical
            network these are the blocks of all stages, in a network without attention the outermost blocks.
        r: width of the bottleneck.
        alpha: factor of the branch.
        every: adapt every k-th of the targeted blocks, beginning with block 0.
        init: start values of U and q: ``"zero"``, or ``"small"``, Gaussian with deviation 1e-4.
    """

    targets: str | Sequence[str] = "all-blocks"
    r: Count = 16
    alpha: float = 1.0
    every: Count = 1
    init: Annotated[str, OneOf(_UP_INITS)] = "zero"

    name = "adaptertune"
    paper = "AdapterTune: Zero-Initialized Low-Rank Adapters for Frozen Vision Transformers, arXiv 2603.14706"
    kinds = frozenset({SiteKind.BLOCK})

    def for_model(self, view: ModelView, inputs: object = None) -> "AdapterTune":
        if self.targets != "all-blocks":
            return self
        try:
            blocks = find_transformer_blocks(view, inputs)
        except ExampleInputsNeeded:
            every = {path for path, site in view.sites.items() if site.kind is SiteKind.BLOCK}
            if every != find_outermost_blocks(view.sites):  # only a run tells which of nested blocks are a transformer
                raise
            return self
        chosen = [b for n, b in enumerate(blocks) if n % self.every == 0 and (not self.layers or n in self.layers)]
        targets = tuple(path for path in chosen if not self.exclude or not is_named(self.exclude, path))
        return dataclasses.replace(self, targets=targets, every=1, layers=()) if targets else self

    def adapts(self, site: Site) -> bool:
        return site.number % self.every == 0

    def params(self, site: Site) -> dict[str, ParamSpec]:
        width, up = site.out_features, _UP_INITS[self.init]
        return {
            "down": ParamSpec((self.r, width), xavier_uniform),
            "down_bias": ParamSpec((self.r,), zeros),
            "up": ParamSpec((width, self.r), up),
            "up_bias": ParamSpec((width,), up),
        }

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        hidden = F.gelu(F.linear(y, p.down, p.down_bias))
        return y + self.alpha * F.linear(hidden, p.up, p.up_bias)
