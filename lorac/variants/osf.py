"""OSF: trains the weight's small singular directions; gradients are orthogonal to the large directions.

Nayak et al. 2025, arXiv 2504.07097; sizes, start values and projection as in PEFT.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch

from lorac.argument_types import Bounds
from lorac.errors import SiteError
from lorac.variants.base import Init, InitContext, Params, ParamSpec, Role, Site, Tensor, WeightVariant


@dataclass(frozen=True, kw_only=True)
class OSF(WeightVariant):
    """``W' = W + U·diag(s)·V − U₀·diag(s₀)·V₀``, U₀·diag(s₀)·V₀ the last k terms of the SVD of W, where U, s, V start.

    Gradients of U and V are orthogonal to the first h singular vectors: P·∂U with P = I − U_h·U_hᵀ, and correspondingly
    for V. An adapter stores the frozen U₀ (out, k), s₀, V₀ (k, in), and U_h (out, h) or V_h (h, in) where W is not
    square.

    Attributes:
        effective_rank: h, or a float up to 1, the share of min(out, in) that is h; None: half. k = min(out, in) − h.
        rank_pattern: module pattern -> effective_rank of these modules.
    """

    effective_rank: Annotated[int | float | None, Bounds(0, exclusive=True)] = None
    rank_pattern: Mapping[str, int | float] = field(default_factory=dict)

    name = "osf"
    paper = "Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning, arXiv 2504.07097"
    patterned: ClassVar[Mapping[str, str]] = {"rank_pattern": "effective_rank"}

    def kept(self, out: int, columns: int) -> int:
        """Return h for a weight (out, in)."""
        side, rank = min(out, columns), self.effective_rank
        share = rank is None or (isinstance(rank, float) and rank <= 1)
        return min(side, int(side * (0.5 if rank is None else rank) if share else rank or 0))

    def check(self, site: Site) -> None:
        super().check(site)
        if not self.kept(site.out_features, site.in_features):
            raise SiteError(
                f"effective_rank={self.effective_rank} keeps no singular direction of '{site.path}'",
                next_step="give a larger one, or add the module to exclude=",
            )

    def split(self, weight: Tensor) -> dict[str, Tensor]:
        """Return the frozen tensors for a base weight (out, in), from an SVD in float32 as in PEFT."""
        left, values, right = torch.linalg.svd(weight.to(torch.float32), full_matrices=False)
        rank, (out, columns) = self.kept(*weight.shape), weight.shape
        found = {"U_init": left[:, rank:], "S_init": values[rank:], "V_init": right[rank:]}
        found |= {"U_high": left[:, :rank]} if out > columns else {}
        found |= {"V_high": right[:rank]} if out < columns else {}
        return {name: tensor.to(weight.dtype).contiguous() for name, tensor in found.items()}

    def params(self, site: Site) -> dict[str, ParamSpec]:
        out, columns = site.out_features, site.in_features
        high = self.kept(out, columns)
        low = min(out, columns) - high
        shapes = {"U_init": (out, low), "S_init": (low,), "V_init": (low, columns)}
        shapes |= {"U_high": (out, high)} if out > columns else {}
        shapes |= {"V_high": (high, columns)} if out < columns else {}
        latest: list[tuple[Tensor, dict[str, Tensor]]] = []

        def frozen(name: str) -> Init:
            def make(context: InitContext) -> Tensor:
                weight = context.weight()
                if not latest or not torch.equal(latest[0][0], weight):
                    latest[:] = [(weight, self.split(weight))]
                return latest[0][1][name].clone()

            return make

        specs = {
            name: ParamSpec(shape, frozen(name), Role.FROZEN, of_gradients=name.endswith("high"))
            for name, shape in shapes.items()
        }
        trained = {f"{part}_low": ParamSpec(shapes[f"{part}_init"], frozen(f"{part}_init")) for part in "USV"}
        return specs | trained

    def weight(self, W: Tensor, p: Params) -> Tensor:
        # u and v equal their parameters, whose gradients they project.
        u, v = p.U_low.detach(), p.V_low.detach()
        du, dv = p.U_low - u, p.V_low - v
        square_u, square_v = W.shape[0] <= W.shape[1], W.shape[0] >= W.shape[1]
        u = u + (p.U_init @ (p.U_init.t() @ du) if square_u else du - p.U_high @ (p.U_high.t() @ du))
        v = v + ((dv @ p.V_init.t()) @ p.V_init if square_v else dv - (dv @ p.V_high.t()) @ p.V_high)
        return W + (u * p.S_low) @ v - (p.U_init * p.S_init) @ p.V_init
