"""VeRA, vector-based random matrix adaptation, and PVeRA: random projections that all sites share are scaled.

Kopiczko et al. 2024, arXiv 2310.11454; shapes, start values and the draw of A and B as in PEFT.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lorac.argument_types import Count, Seed
from lorac.variants.base import (
    BranchVariant,
    Context,
    Dropout,
    InitContext,
    Params,
    ParamSpec,
    Role,
    Site,
    Tensor,
    WeightVariant,
)
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


@dataclass(frozen=True, kw_only=True)
class VeRA(RandomProjections, WeightVariant):
    """``W' = W + diag(λ_b)·B·diag(λ_d)·A``: A and B are random, frozen, and shared by all sites."""

    name = "vera"
    paper = "VeRA: Vector-based Random Matrix Adaptation, arXiv 2310.11454"
    halves = 1

    def weight(self, W: Tensor, p: Params) -> Tensor:
        rows, columns = W.shape
        up = p.vera_lambda_b[:, None] * p.vera_B[:rows]
        down = p.vera_lambda_d[:, None] * p.vera_A[:, :columns]
        return W + up @ down


@dataclass(frozen=True, kw_only=True)
class PVeRA(RandomProjections, BranchVariant):
    """``y' = y + λ_b∘B·μ``, μ = λ_d[:r]∘A[:r]·x; in training μ + σ∘ε for μ, σ = exp(λ_d[r:]∘A[r:]·x / 2).

    PVeRA: VeRA whose hidden values are drawn from learned distributions during training. arXiv 2512.07703; shapes,
    start values and the draw of A and B as in PEFT.

    A is (2r, in), λ_d (2r,). The noise ε ~ N(0, 1) is drawn from torch's generator, as in PEFT; without noise the
    method is affine and can be merged.
    """

    name = "pvera"
    paper = "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation, arXiv 2512.07703"
    dropout_place = Dropout.NONE  # the formula applies dropout, since it is not affine in training
    halves = 2  # for the mean and the log-variance
    samples = True

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        if ctx.training:
            x = F.dropout(x, self.dropout)
        down, scale = p.pvera_A[:, : x.shape[-1]], p.pvera_lambda_d
        hidden = scale[: self.r] * F.linear(x, down[: self.r])
        if ctx.training:
            deviation = torch.exp(0.5 * (scale[self.r :] * F.linear(x, down[self.r :])))
            hidden = hidden + torch.randn_like(deviation) * deviation
        return y + p.pvera_lambda_b * F.linear(hidden, p.pvera_B[: y.shape[-1]])
