"""TeRA: vectors in a random tensor network. TeRA-style, unverified.

Gu et al. 2025, arXiv 2509.03234. From its abstract: a Tucker-like network whose core and factors are random, frozen and
shared by the layers, with trained diagonal factors per layer. Position of the diagonals, modes, scale and start values
are lorac's choice; each has a field.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Count, OneOf, Seed
from lorac.errors import OptionError
from lorac.variants._layer_shapes import require_one_group
from lorac.variants.base import Init, InitContext, Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import ones, zeros
from lorac.variants.low_rank import InputDropout


def balanced_modes(size: int, order: int) -> tuple[int, ...]:
    """Split ``size`` into ``order`` divisors of similar size, smaller divisors first: 11008 = 86·128."""
    if order == 1:
        return (size,)
    first = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0 and n**order <= size)
    return (first, *balanced_modes(size // first, order - 1))


@dataclass(frozen=True, kw_only=True)
class TeRA(InputDropout, WeightVariant):
    """``W' = W + s·mat(G ×₁ U₁·diag(d₁) ×₂ … ×_K U_K·diag(d_K))`` with K = 2·order modes, half of out, half of in.

    The core G (R₁, …, R_K) and the factors U_k (n_k, R_k) are random, frozen, and shared by all sites, with the size
    that the largest site needs; a site uses their first entries, with U_k scaled to variance 1/R_k. The vectors d_k
    (R_k,) are trained. With order 1 and U₁ = 1 this is VeRA.

    Attributes:
        r: largest R_k; None for R_k = n_k, where the update can have full rank.
        order: number of modes into which out is split, and into which in is split.
        scale: s; None for 1/√in.
        factors: ``"dense"``; or ``"identity"`` for U_k = 1, where only G and the diagonals act and r is ignored.
        zero_mode: list index k of the vector that starts at zero; all others start at one.
        seed: seed of G and U, drawn in this order.
    """

    r: Count | None = None
    order: Count = 2
    scale: float | None = None
    factors: Annotated[str, OneOf(("dense", "identity"))] = "dense"
    zero_mode: int = -1
    seed: Seed = 0

    name = "tera"
    paper = "TeRA: Vector-based Random Tensor Network for High-Rank Adaptation, arXiv 2509.03234"

    def __post_init__(self) -> None:
        super().__post_init__()
        modes = 2 * self.order
        if not -modes <= self.zero_mode < modes:
            raise OptionError(
                f"TeRA of order {self.order} has {modes} vectors, and zero_mode={self.zero_mode} names none of them",
                next_step=f"give a zero_mode from {-modes} to {modes - 1}",
            )

    def check(self, site: Site) -> None:
        super().check(site)
        require_one_group(self.name, site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        sizes = self._modes(site.out_features, site.in_features)
        ranks = self._ranks(sizes)
        specs = {"tera_G": ParamSpec(ranks, self._draw(0), role=Role.FROZEN, shared=True)}
        for k, shape in enumerate(zip(sizes, ranks, strict=True)):
            if self.factors == "dense":
                specs[f"tera_U_{k}"] = ParamSpec(shape, self._draw(k + 1), role=Role.FROZEN, shared=True)
        zero = range(len(ranks))[self.zero_mode]
        for k, rank in enumerate(ranks):
            specs[f"tera_d_{k}"] = ParamSpec((rank,), zeros if k == zero else ones, decay=False)
        return specs

    def weight(self, W: Tensor, p: Params) -> Tensor:
        rows, columns = W.shape
        sizes = self._modes(rows, columns)
        ranks = self._ranks(sizes)
        core = p.tera_G[tuple(slice(rank) for rank in ranks)]
        scaled = [self._factor(p, k, *shape) for k, shape in enumerate(zip(sizes, ranks, strict=True))]
        scale = columns**-0.5 if self.scale is None else self.scale
        left, right = scaled[: self.order], scaled[self.order :]
        if min(math.prod(ranks[: self.order]), math.prod(ranks[self.order :])) >= min(rows, columns):
            for factor in scaled:  # multiplies the first mode (R_k,) by U_k·diag(d_k) and moves it to the end
                core = torch.tensordot(core, factor, dims=([0], [1]))
            return W + scale * core.reshape(rows, columns)
        up, down = (functools.reduce(torch.kron, part) for part in (left, right))
        return W + scale * up @ (core.reshape(up.shape[1], down.shape[1]) @ down.t())

    def _modes(self, rows: int, columns: int) -> tuple[int, ...]:
        return (*balanced_modes(rows, self.order), *balanced_modes(columns, self.order))

    def _ranks(self, sizes: Sequence[int]) -> tuple[int, ...]:
        largest = None if self.factors == "identity" else self.r
        return tuple(size if largest is None else min(size, largest) for size in sizes)

    def _factor(self, p: Params, k: int, size: int, rank: int) -> Tensor:
        """Return U_k·diag(d_k)."""
        diagonal = getattr(p, f"tera_d_{k}")
        if self.factors == "identity":
            return torch.diag(diagonal)
        drawn = getattr(p, f"tera_U_{k}")
        return drawn[:size, :rank] * (diagonal * math.sqrt(drawn.shape[1] / rank))

    def _draw(self, position: int) -> Init:
        """Return an initialiser that draws G ~ N(0, 1), then U_k ~ N(0, 1/R_k), and returns draw ``position``."""

        def draw(context: InitContext) -> Tensor:
            generator = torch.Generator().manual_seed(self.seed)
            earlier = ["tera_G", *(f"tera_U_{k}" for k in range(position))][:position]
            for name in earlier:
                torch.randn(getattr(context.params, name).shape, generator=generator)
            drawn = torch.randn(context.shape, generator=generator)
            return drawn if position == 0 else drawn * context.shape[1] ** -0.5

        return draw
