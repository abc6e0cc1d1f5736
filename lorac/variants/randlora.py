"""RandLoRA: full-rank updates from scaled random bases.

Albert et al. 2025, arXiv 2502.00987; layout and draw of the bases, and their unusual pairing, as in PEFT.
"""

import math
from dataclasses import dataclass

import torch

from lorac.argument_types import Count, Seed
from lorac.variants.base import InitContext, Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import constant, zeros
from lorac.variants.low_rank import InputDropout

Shape = tuple[int, int, int]


def draw_bases(*shapes: Shape, key: int, sparsity: float | None = None) -> list[Tensor]:
    """Draw A (r, 1, d), then B (D, n, r), in float32 with deviation 1, from a CPU generator seeded with ``key``.

    They are drawn in bfloat16, as in PEFT on devices that support it, and equal PEFT's where torch's generator draws
    the same.

    Args:
        shapes: shapes of A and B; A does not depend on B.
        key: the seed.
        sparsity: s, for entries −1, 0, 1 with probabilities 1/2s, 1 − 1/s, 1/2s; None: uniform entries.
    """
    generator = torch.Generator().manual_seed(key)
    if sparsity is None:
        drawn = [_uniform(shape, generator) for shape in shapes]
    else:  # −1, 0 or 1
        share = 1 / (2 * sparsity)
        numbers = [torch.rand(shape, generator=generator) for shape in shapes]
        drawn = [(each > 1 - share).float() - (each < share).float() for each in numbers]
    return [(values / values.std()).float() for values in drawn]


def _uniform(shape: Shape, generator: torch.Generator) -> Tensor:
    """Draw blocks (rows, 1, columns) one at a time and concatenate them."""
    rows, count, columns = shape
    blocks = [torch.empty((rows, 1, columns), dtype=torch.bfloat16) for _ in range(count)]
    for block in blocks:
        torch.nn.init.kaiming_uniform_(block, a=math.sqrt(5), generator=generator)
    return torch.cat(blocks, dim=1)


@dataclass(frozen=True, kw_only=True)
class RandLoRA(InputDropout, WeightVariant):
    """``W' = W + s·Σⱼ Bⱼ·diag(λⱼ)·A·diag(γⱼ)`` over n = ⌈d/r⌉ bases, s = alpha/r; transposed where in > out.

    d and D are the smaller and the larger of out and in. A (r, 1, d) and B (D, n, r) are random, frozen, and shared by
    all sites, which use their first entries. Row k·n + j of λ∘A∘γ is multiplied by column t = k·n + j of B[:D, :n]
    flattened over its last two axes, as in every known file; the paper's sum has the same (k, j) on both sides.

    Attributes:
        r: rank of one base; a smaller rank means more bases and more parameters.
        alpha: PEFT's randlora_alpha.
        projection_prng_key: seed of A and B.
        sparse: draw A and B from −1, 0, 1 with probabilities 1/6, 2/3, 1/6, scaled to deviation 1.
        very_sparse: as ``sparse``, with probability 1/(2√d) for each of ±1; overrides ``sparse``.
    """

    r: Count = 32
    alpha: float = 640
    projection_prng_key: Seed = 0
    sparse: bool = False
    very_sparse: bool = False

    name = "randlora"
    paper = "RandLoRA: Full-rank parameter-efficient fine-tuning of large models, arXiv 2502.00987"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        small, large = sorted((site.out_features, site.in_features))
        count = math.ceil(small / self.r)
        return {
            "randlora_A": ParamSpec((self.r, 1, small), self._draw_a, role=Role.FROZEN, shared=True),
            "randlora_B": ParamSpec((large, count, self.r), self._draw_b, role=Role.FROZEN, shared=True),
            "randlora_lambda": ParamSpec((self.r, count), zeros),
            "randlora_gamma": ParamSpec((count, small), constant(1 / max(count, small))),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        small, large = sorted(W.shape)
        count = p.randlora_gamma.shape[0]
        scaled = p.randlora_lambda[:, :, None] * p.randlora_A[:, :, :small] * p.randlora_gamma
        thin, wide = scaled.flatten(0, 1), p.randlora_B[:large, :count].flatten(1)
        delta = wide @ thin if W.shape[1] == small else thin.t() @ wide.t()
        return W + self.alpha / self.r * delta

    def sparsity(self, small: int) -> float | None:
        """Return the sparsity for ``draw_bases``, where A has ``small`` columns."""
        return math.sqrt(small) if self.very_sparse else 3 if self.sparse else None

    def _draw_a(self, context: InitContext) -> Tensor:
        return self._draw_bases(context.shape)[0]

    def _draw_b(self, context: InitContext) -> Tensor:
        return self._draw_bases(tuple(context.params.randlora_A.shape), context.shape)[1]

    def _draw_bases(self, *shapes: tuple[int, ...]) -> list[Tensor]:
        sparsity = self.sparsity(shapes[0][2])
        return draw_bases(*shapes, key=self.projection_prng_key, sparsity=sparsity)  # type: ignore[arg-type]  # shapes of three axes
