"""Random projections that all sites of an adapter share, which VeRA and PVeRA scale."""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch

from lorac.argument_types import Count, Seed
from lorac.variants.base import InitContext, ParamSpec, Role, Site, Tensor
from lorac.variants.initialisers import constant, zeros
from lorac.variants.low_rank import InputDropout


def draw_projections(*shapes: tuple[int, ...], key: int) -> list[Tensor]:
    """Draw A (rows, in), then B (out, r), in float32 from a CPU generator seeded with ``key``.

    Both are U(±√(6 / size of the last axis)), and equal PEFT's bit for bit where torch's generator draws the same.
    """
    generator = torch.Generator().manual_seed(key)
    return [_uniform(shape, generator) for shape in shapes]


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # In the order of operations of torch's kaiming_uniform, since the rounding of the bound decides the bits.
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True, kw_only=True)
class RandomProjections(InputDropout):
    """A method with random, frozen A and B, which all sites share, and trained scales λ_b (out,) and λ_d.

    A and B have the size that the largest site needs; a site uses the first ``in`` columns of A and the first ``out``
    rows of B.

    Attributes:
        r: rank.
        d_initial: start value of λ_d.
        projection_prng_key: seed of A and B.
    """

    r: Count = 256
    d_initial: float = 0.1
    projection_prng_key: Seed = 0

    @property
    @abstractmethod
    def halves(self) -> int:
        """The number of projections (r, in) that are stacked in A and λ_d."""

    def params(self, site: Site) -> dict[str, ParamSpec]:
        rows = self.halves * self.r
        return {
            f"{self.name}_A": ParamSpec((rows, site.in_features), self._draw_a, role=Role.FROZEN, shared=True),
            f"{self.name}_B": ParamSpec((site.out_features, self.r), self._draw_b, role=Role.FROZEN, shared=True),
            f"{self.name}_lambda_b": ParamSpec((site.out_features,), zeros),
            f"{self.name}_lambda_d": ParamSpec((rows,), constant(self.d_initial)),
        }

    def _draw_a(self, context: InitContext) -> Tensor:
        return draw_projections(context.shape, key=self.projection_prng_key)[0]

    def _draw_b(self, context: InitContext) -> Tensor:
        drawn = tuple(getattr(context.params, f"{self.name}_A").shape)
        return draw_projections(drawn, context.shape, key=self.projection_prng_key)[1]
