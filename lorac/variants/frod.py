"""FRoD: layers of one role share a basis of their weights; each layer trains a diagonal and a few other entries.

Wan et al. 2025, arXiv 2512.23485; basis and start values as in PEFT's FROD.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch

from lorac.argument_types import Bounds, Seed
from lorac.variants.base import InitContext, Params, ParamSpec, Role, Site, Tensor, WeightVariant
from lorac.variants.initialisers import zeros
from lorac.variants.low_rank import InputDropout


def role_of(path: str) -> str:
    """Return the role of a layer in its block, from the end of its path; layers of one role share a basis."""
    *blocks, owner, leaf = ("", *path.split("."))
    if not owner or owner.isdigit():
        return leaf
    role = f"{owner}_{leaf}"
    return "attention_output" if role == "output_dense" and blocks[-1] == "attention" else role


@dataclass(frozen=True, kw_only=True)
class FRoD(InputDropout, WeightVariant):
    """``W' = U·(diag(λ) + S)·Vᵀ``, with λ (in,) and the entries of the sparse S (in, in) trained, S = 0 at the start.

    All layers of one role (``role_of``) and width share V (in, in). W = U·diag(λ₀)·Vᵀ, where the columns of U (out, in)
    have the norm 1, and λ starts at λ₀. An adapter stores U and V.

    Attributes:
        sparse_rate: share of S that is trained, off the diagonal only.
        regularization_alpha: added to the diagonals that are inverted for V.
        projection_prng_key: seed of the positions in S.
    """

    sparse_rate: Annotated[float, Bounds(0, 1)] = 0.01
    regularization_alpha: Annotated[float, Bounds(0)] = 1e-3
    projection_prng_key: Seed = 0

    name = "frod"
    paper = "FRoD: Full-Rank Efficient Fine-Tuning with Rotational Degrees for Fast Convergence, arXiv 2512.23485"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        size, role = site.in_features, f"{role_of(site.path)} {site.in_features}"
        count = min(max(int(size * size * self.sparse_rate), int(self.sparse_rate > 0)), size * size - size)
        sparse = {
            "frod_s_indices": ParamSpec((2, count), self._positions, Role.INDEX, below=(size, size), tie=f"S {role}"),
            "frod_lambda_s_values": ParamSpec((count,), zeros),
        }
        return {
            "frod_V": ParamSpec((size, size), self._basis, Role.FROZEN, tie=f"V {role}"),
            "frod_U": ParamSpec((site.out_features, size), lambda c: _solve(c)[0], Role.FROZEN),
            "frod_lambda_l": ParamSpec((size,), lambda c: _solve(c)[1]),
            **(sparse if count else {}),
        }

    def weight(self, W: Tensor, p: Params) -> Tensor:
        core = torch.diag(p.frod_lambda_l)
        if hasattr(p, "frod_lambda_s_values"):
            rows, columns = p.frod_s_indices
            core = torch.index_put(core, (rows, columns), p.frod_lambda_s_values, accumulate=True)
        return p.frod_U @ core @ p.frod_V.t()

    def _basis(self, context: InitContext) -> Tensor:
        basis = join(context.weights(), self.regularization_alpha)
        return basis.to(context.site.dtype)  # U is solved from V in this dtype, as in PEFT: a rounded V has another U

    def _positions(self, context: InitContext) -> Tensor:
        size = context.site.in_features
        generator = torch.Generator().manual_seed(self.projection_prng_key)
        chosen = torch.randperm(size * size - size, generator=generator)[: context.shape[1]]
        rows, behind = chosen // (size - 1), chosen % (size - 1)
        return torch.stack([rows, behind + (behind >= rows)])


def join(weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Return the basis V (in, in) that weights (out, in) share.

    With [W₁; W₂; …] = [Q₁; Q₂; …]·R it is Rᵀ·E, E the eigenvectors of the mean of (Qₖᵀ·Qₖ + alpha·I)⁻¹: the
    higher-order generalised SVD. If the stack has fewer rows than columns, V is from its SVD.
    """
    stacked = torch.cat([weight.float() for weight in weights])
    if stacked.shape[0] < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True)[2].t().contiguous()
    q, r = torch.linalg.qr(stacked)
    eye = torch.eye(r.shape[1])
    slices = q.split([len(weight) for weight in weights])
    mean = sum(torch.linalg.inv(part.t() @ part + alpha * eye) for part in slices) / len(slices)
    return r.t() @ torch.linalg.eigh(torch.as_tensor(mean))[1]


def _solve(context: InitContext) -> tuple[Tensor, Tensor]:
    """Return U (out, in) and λ₀ (in,) of the weight in the basis."""
    basis, weight = context.params.frod_V.double(), context.weight().double()
    try:
        product = torch.linalg.solve(basis, weight.t()).t()
    except RuntimeError:  # singular
        product = weight @ torch.linalg.pinv(basis, rtol=1e-6).t()
    norms = torch.linalg.vector_norm(product, dim=0)
    return torch.where(norms > 1e-12, product / norms, 0), norms
