"""VeRA: vector-based random matrix adaptation.

Kopiczko et al. 2024, arXiv 2310.11454; shapes, start values and the draw of A and B as in PEFT.
"""

import math
from dataclasses import dataclass

import torch

from lorac.argument_types import Count, Seed
from lorac.variants.base import InitContext, Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import constant, zeros
from lorac.variants.low_rank import InputDropout


def draw_projections(r: int, out: int, columns: int, key: int) -> tuple[Tensor, Tensor]:
    """Draw A (r, columns), then B (out, r), in float32 from a CPU generator seeded with ``key``.

    Both are U(±√(6 / size of the last axis)), and equal PEFT's bit for bit if torch's generator does.
    """
    generator = torch.Generator().manual_seed(key)
    return _uniform((r, columns), generator), _uniform((out, r), generator)


def _uniform(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    # Computed in the order of torch's kaiming_uniform, since the bound's rounding decides the bits.
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True, kw_only=True)
class VeRA(InputDropout, WeightVariant):
    """``W' = W + diag(λ_b)·B·diag(λ_d)·A``: A and B are random, frozen, and shared by all sites.

    A and B have the size that the largest site needs; a site uses the first in columns of A and the first out rows of
    B.

    Attributes:
        r: rank.
        d_initial: start value of λ_d.
        projection_prng_key: seed of A and B.
    """

    r: Count = 256
    d_initial: float = 0.1
    projection_prng_key: Seed = 0

    name = "vera"
    paper = "VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {
            "vera_A": ParamSpec((self.r, site.in_features), self._draw_a, role=Role.FROZEN, shared=True),
            "vera_B": ParamSpec((site.out_features, self.r), self._draw_b, role=Role.FROZEN, shared=True),
            "vera_lambda_b": ParamSpec((site.out_features,), zeros),
            "vera_lambda_d": ParamSpec((self.r,), constant(self.d_initial)),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        rows, columns = W.shape
        up = p.vera_lambda_b[:, None] * p.vera_B[:rows]
        down = p.vera_lambda_d[:, None] * p.vera_A[:, :columns]
        return W + up @ down

    def _draw_a(self, context: InitContext) -> Tensor:
        return draw_projections(self.r, 0, context.shape[1], self.projection_prng_key)[0]

    def _draw_b(self, context: InitContext) -> Tensor:
        return draw_projections(self.r, context.shape[0], context.params.vera_A.shape[1], self.projection_prng_key)[1]
