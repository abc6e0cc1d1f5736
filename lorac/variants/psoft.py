"""PSOFT: the weight's principal subspace is rotated.

Wu et al. 2025, arXiv 2505.11235; factors, rotation and start values as in PEFT's PSOFT.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds, Count, OneOf, Seed
from lorac.variants._decompositions import cayley, neumann, require_rank, skew, truncated_svd
from lorac.variants.base import InitContext, Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import ones, zeros
from lorac.variants.low_rank import InputDropout


@dataclass(frozen=True, kw_only=True)
class PSOFT(InputDropout, WeightVariant):
    """``W' = W + s·B·(diag(b)·R·diag(a) − I)·A``, s = alpha/r, with s·B·A the rank-r truncated SVD of W, frozen.

    R = (I + Q)·(I − Q)⁻¹, or the series of ``neumann``, of the skew-symmetric Q with the upper triangle psoft_R
    (r(r−1)/2,), row by row.

    Attributes:
        r: rank, at most min(out, in).
        alpha: s = alpha/r, which cancels for a trained R.
        ab_svd_init: ``"psoft_init"``: A = Vᵀ and B = U·S/s; ``"pissa_init"``: both have √(S/s).
        psoft_svd: ``"full"``, or ``"lowrank"`` for the randomised SVD of ``torch.svd_lowrank``.
        psoft_svd_lowrank_niter: number of rounds of the randomised SVD.
        random_seed: seed of the randomised SVD.
        psoft_orth: whether R is a rotation; else psoft_R (r, r) is R.
        psoft_mag_a: whether the vector a is trained; else it is 1.
        psoft_mag_b: whether the vector b is trained; else it is 1.
        use_cayley_neumann: whether the series replaces the inverse.
        num_cayley_neumann_terms: number of terms of the series, up to 100: every term is an op of the program.
        cayley_neumann_eps: largest Frobenius norm of Q in the series; None for no bound.
    """

    r: Count = 32
    alpha: float = 32
    ab_svd_init: Annotated[str, OneOf(("psoft_init", "pissa_init"))] = "psoft_init"
    psoft_svd: Annotated[str, OneOf(("full", "lowrank"))] = "full"
    psoft_svd_lowrank_niter: Annotated[int, Bounds(0, 1000)] = 10
    random_seed: Seed = 0
    psoft_orth: bool = True
    psoft_mag_a: bool = True
    psoft_mag_b: bool = True
    use_cayley_neumann: bool = False
    num_cayley_neumann_terms: Annotated[int, Bounds(1, 100)] = 5
    cayley_neumann_eps: Annotated[float | None, Bounds(0, 1, exclusive=True)] = None

    name = "psoft"
    paper = "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation, arXiv 2505.11235"

    def check(self, site: Site) -> None:
        super().check(site)
        require_rank("PSOFT", self.r, site)

    def params(self, site: Site) -> dict[str, ParamSpec]:
        shape = (self.r * (self.r - 1) // 2,) if self.psoft_orth else (self.r, self.r)
        magnitudes = {"psoft_a": self.psoft_mag_a, "psoft_b": self.psoft_mag_b}
        return {
            "psoft_A": ParamSpec((self.r, site.in_features), lambda c: self._factors(c)[1], Role.FROZEN),
            "psoft_B": ParamSpec((site.out_features, self.r), lambda c: self._factors(c)[0], Role.FROZEN),
            **(
                {"psoft_R": ParamSpec(shape, zeros if self.psoft_orth else lambda c: torch.eye(self.r))}
                if shape[0]
                else {}
            ),
            **{name: ParamSpec((self.r,), ones) for name, trained in magnitudes.items() if trained},
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        core = p.psoft_R if self.r > 1 or not self.psoft_orth else W.new_zeros(0)  # in one dimension R is 1
        if self.psoft_orth:
            q = skew(core[None], self.r)
            if self.use_cayley_neumann and self.cayley_neumann_eps is not None:
                q = q * (self.cayley_neumann_eps / torch.linalg.vector_norm(q).clamp_min(self.cayley_neumann_eps))
            core = (neumann(q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(-q))[0]
        core = p.psoft_b[:, None] * core if self.psoft_mag_b else core
        core = core * p.psoft_a if self.psoft_mag_a else core
        eye = torch.eye(self.r, dtype=core.dtype, device=core.device)
        return W + self.alpha / self.r * ((p.psoft_B @ (core - eye)) @ p.psoft_A)

    def _factors(self, context: InitContext) -> tuple[Tensor, Tensor]:
        rounds = self.psoft_svd_lowrank_niter if self.psoft_svd == "lowrank" else None
        u, s, vh = truncated_svd(context.weight(), self.r, rounds=rounds, seed=self.random_seed)
        s = s * self.r / self.alpha
        left, right = (s, torch.ones_like(s)) if self.ab_svd_init == "psoft_init" else (s.sqrt(), s.sqrt())
        return u * left, right[:, None] * vh
