"""LoLDU: trains the diagonal of an LDU factorisation of the weight; the triangles are frozen.

Shi et al. 2024, arXiv 2410.13618. W = P·L·D·U by LU with partial pivoting, L and U with unit diagonals. The paper
removes the first r terms from the weight. Here W does not change and a low-rank branch gives the same result, so that
adapters can share the base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Count, OneOf
from lorac.variants._layer_shapes import require_at_most, require_one_group
from lorac.variants.base import Init, InitContext, Params, ParamSpec, Role, Site, SiteKind, Tensor, WeightVariant
from lorac.variants.initialisers import ones, zeros


@dataclass(frozen=True, kw_only=True)
class LoLDU(WeightVariant):
    """``W' = W + (P·L_r)·diag(σ·z − σ₀·D_r)·U_r``, with z (r,) trained and the factors of W frozen.

    P·L_r (out, r), D_r (r,) and U_r (r, in) are the first terms of W = P·L·D·U; for an embedding they are the
    transposed terms of its table (V, d). σ₀ = alpha/r. An adapter stores its factors, since LU may pivot differently on
    another machine.

    Attributes:
        r: number of terms, at most min(out, in).
        alpha: the released code's lora_alpha; None for r, which gives σ₀ = 1 as in the paper's runs.
        train_sigma: whether σ is trained too, as in the paper's formula; the paper's parameter counts and the released
            code keep σ₀.
        init: start value of z. ``"lu"``: D_r, the only one that does not change the output. ``"uniform"``:
            U(−|m|/2, |m|/2) with m the mean of D_r; ``"normal"``: N(m, std(D_r)²); ``"constant"``: m;
            ``"s_uniform"``: U(−1, 1); ``"s_normal"``: N(0, 1); ``"ones"``; ``"zeros"``.
    """

    r: Count = 8
    alpha: float | None = None
    train_sigma: bool = False
    init: Annotated[str, OneOf(_STARTS)] = "lu"

    name = "loldu"
    paper = (
        "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning, "
        "arXiv 2410.13618"
    )

    @property
    def sigma(self) -> float:
        """σ₀."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    def check(self, site: Site) -> None:
        super().check(site)
        require_at_most(site, "r", self.r, min(site.out_features, site.in_features))
        require_one_group(self.name, site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        found: list[tuple[Tensor, ...]] = []  # ``lora_B`` computes the factors, and later tensors reuse them

        def factor(index: int) -> Init:
            def make(context: InitContext) -> Tensor:
                if not index or not found:
                    found[:] = [_factorise(context, self.r)]
                return found[0][index]

            return make

        shapes = {"lora_B": (site.out_features, self.r), "lora_A": (self.r, site.in_features), "diagonal": (self.r,)}
        specs = {
            **{name: ParamSpec(shape, factor(i), Role.FROZEN) for i, (name, shape) in enumerate(shapes.items())},
            "vector_z": ParamSpec((self.r,), _STARTS[self.init], decay=False),
        }
        if self.train_sigma:
            specs["scaling_factor"] = ParamSpec(
                (), lambda context: torch.tensor(self.sigma, dtype=torch.float64), decay=False
            )
        return specs

    def weight(self, W: Tensor, p: Params) -> Tensor:
        sigma = p.scaling_factor if self.train_sigma else self.sigma
        core = sigma * p.vector_z - self.sigma * p.diagonal
        return W + p.lora_B @ (core[:, None] * p.lora_A)


def _factorise(context: InitContext, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return P·L_r (out, r), U_r (r, in) and D_r (r,)."""
    # The paper factorises the matrix that the module stores.
    table = context.site.kind is SiteKind.EMBEDDING
    permutation, lower, upper = torch.linalg.lu(context.weight().t() if table else context.weight())
    diagonal = upper.diagonal()[:r]
    # A singular leading block gives a zero here; its row is not divided, and z starts at 0.
    left = lower[permutation.argmax(dim=1), :r]
    right = upper[:r] / torch.where(diagonal == 0, 1, diagonal)[:, None]
    b, a = (right.t(), left.t()) if table else (left, right)
    # LAPACK's factors are column-major views of larger tensors.
    b, a, diagonal = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (b, a, diagonal))
    return b, a, diagonal


def _uniform_around_zero(context: InitContext, half: Tensor | float) -> Tensor:
    """Draw from U(−half, half)."""
    return half * (2 * torch.rand(context.shape, generator=context.generator) - 1)


def _gaussian(context: InitContext, std: Tensor | float, mean: Tensor | float = 0.0) -> Tensor:
    """Draw from N(mean, std²)."""
    return mean + std * torch.randn(context.shape, generator=context.generator)


_STARTS: Mapping[str, Callable[[InitContext], Tensor]] = {
    "lu": lambda context: context.params.diagonal.clone(),
    "uniform": lambda context: _uniform_around_zero(context, context.params.diagonal.mean().abs() / 2),
    "normal": lambda context: _gaussian(
        context,
        context.params.diagonal.std(correction=int(len(context.params.diagonal) > 1)),
        context.params.diagonal.mean(),
    ),
    "constant": lambda context: context.params.diagonal.mean().expand(context.shape).clone(),
    "s_uniform": lambda context: _uniform_around_zero(context, 1.0),
    "s_normal": lambda context: _gaussian(context, 1.0),
    "ones": ones,
    "zeros": zeros,
}
