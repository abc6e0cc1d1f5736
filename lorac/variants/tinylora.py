"""TinyLoRA: a few trained numbers, shared by groups of layers, mix random cores between frozen factors of W.

Morris et al. 2026, arXiv 2602.04118; factors, cores and groups as in PEFT's TINYLORA.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds, Count, Seed
from lorac.frontend.model_view import ModelView
from lorac.variants._decompositions import truncated_svd
from lorac.variants.base import InitContext, Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import zeros
from lorac.variants.low_rank import InputDropout


@dataclass(frozen=True, kw_only=True)
class TinyLoRA(InputDropout, WeightVariant):
    """``W' = W + B·(Σᵢ vᵢ·Pᵢ)·A`` with B·A the rank-r truncated SVD of W, both with √S, and P (u, r, r) random, frozen.

    The rank is at most min(out, in). P ~ N(0, 1/r). v (u,) is trained; each group of sites shares one v.

    Attributes:
        r: rank.
        u: length of v.
        weight_tying: t: n sites form n·(1 − t) groups, so that each site has a separate v at 0, and all share one at 1.
        projection_seed: seed of P at the first site; the seed of the i-th site after it is larger by i.
        order: the paths of the sites in the model's order; set by ``for_model``.
    """

    r: Count = 2
    u: Count = 64
    weight_tying: Annotated[float, Bounds(0, 1)] = 0.0
    projection_seed: Seed = 42
    order: Sequence[str] = ()

    name = "tinylora"
    paper = "Learning to Reason in 13 Parameters, arXiv 2602.04118"

    def for_model(self, view: ModelView, inputs: object = None) -> "TinyLoRA":
        return dataclasses.replace(self, order=tuple(site.path for site in self.named_sites(view)))

    def group(self, path: str) -> int:
        """Return the number of a site's group, as PEFT assigns it."""
        count = max(1, len(self.order))
        groups = max(1, round(count * (1 - self.weight_tying)))
        return min(self._index(path) // max(1, count // groups), groups - 1)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        rank = min(self.r, site.out_features, site.in_features)
        return {
            "tinylora_A": ParamSpec((rank, site.in_features), lambda c: _factors(c)[1], Role.FROZEN),
            "tinylora_B": ParamSpec((site.out_features, rank), lambda c: _factors(c)[0], Role.FROZEN),
            "tinylora_P": ParamSpec((self.u, rank, rank), self._draw, Role.FROZEN),
            "tinylora_v": ParamSpec((self.u,), zeros, tie=f"tinylora_v.{self.group(site.path)}"),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        core = torch.tensordot(p.tinylora_v, p.tinylora_P, dims=1)
        return W + (p.tinylora_B @ core) @ p.tinylora_A

    def _index(self, path: str) -> int:
        return self.order.index(path) if path in self.order else 0

    def _draw(self, context: InitContext) -> Tensor:
        generator = torch.Generator().manual_seed(self.projection_seed + self._index(context.site.path))
        return torch.empty(context.shape).normal_(0, context.shape[1] ** -0.5, generator=generator)


def _factors(context: InitContext) -> tuple[Tensor, Tensor]:
    rank = min(context.shape)
    if context.site.kind is SiteKind.EMBEDDING:  # PEFT decomposes the table (V, d)
        u, s, vh = truncated_svd(context.weight().t(), rank)
        u, vh = vh.t(), u.t()
    else:
        u, s, vh = truncated_svd(context.weight(), rank)
    return u * s.sqrt(), s.sqrt()[:, None] * vh
