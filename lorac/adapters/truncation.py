"""The nearest matrices of lower rank: from factors, without their product, or from a matrix by random projections.

The nearest matrix in the Frobenius norm has the largest singular values, and its error is the norm of the other values
(Eckart, Young 1936). Random projections: Halko, Martinsson, Tropp 2011, arXiv 0909.4061, algorithms 4.4 and 5.1.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_WHOLE = 256
"""A matrix with a side up to this length gets a full SVD, which takes milliseconds."""
_SPARE = 16
"""Columns of a projection in addition to the wanted rank."""
_ROUNDS = 4
"""Number of times that a projection is multiplied by the matrix and its transpose."""


@dataclass(frozen=True)
class Truncation:
    """A matrix of lower rank, or a stack of such matrices.

    Attributes:
        a: A (…, r, in).
        b: B (…, out, r).
        error: ‖D − B·A‖ / ‖D‖ in the Frobenius norm, for a stack the largest; 0 for D = 0.
    """

    a: Tensor
    b: Tensor
    error: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.a.shape[-2]


def compute_product_svd(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (…, m, r), Σ (…, r) and Vᵀ (…, r, n) of B·A, without computing the product."""
    (left, inner), (right, outer) = torch.linalg.qr(b), torch.linalg.qr(a.mT)
    u, s, vh = torch.linalg.svd(inner @ outer.mT, full_matrices=False)
    return left @ u, s, vh @ right.mT


def truncate_product(b: Tensor, a: Tensor, rank: int | None = None, tolerance: float = 0.0) -> Truncation:
    """Return the nearest matrix to B·A, of the smallest rank with an error within the tolerance and rounding.

    Args:
        b: B (…, out, R).
        a: A (…, R, in).
        rank: the largest rank, even if the error exceeds the tolerance; None: no limit.
        tolerance: the largest error.

    Returns:
        The truncation; it has the given factors if no lower rank suffices.
    """
    if not a.shape[-2]:
        return Truncation(a.new_zeros(*a.shape[:-2], 1, a.shape[-1]), b.new_zeros(*b.shape[:-1], 1), 0.0)
    wide = torch.promote_types(b.dtype, torch.float32)
    u, s, vh = compute_product_svd(b.to(wide), a.to(wide))
    made = _cut(u, s, vh, min(find_rank(s, tolerance), rank or s.shape[-1]), tail_errors(s))
    if made.rank >= a.shape[-2]:
        return Truncation(a, b, 0.0)
    return Truncation(made.a.to(a.dtype), made.b.to(b.dtype), made.error)


def truncate_matrix(matrix: Tensor, rank: int | None = None, tolerance: float = 0.0) -> Truncation:
    """Return the nearest matrix to D (…, out, in), of the smallest rank with an error within tolerance and rounding.

    Large matrices are projected on random columns with a fixed seed, so that equal matrices give equal results. The
    error is then slightly larger than the smallest possible error; it is measured, and is within the tolerance too.

    Args:
        rank: the largest rank, even if the error exceeds the tolerance; None: no limit.
        tolerance: the largest error.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    least, width = min(matrix.shape[-2:]), rank or 2 * _SPARE
    bounded = rank is not None or tolerance > 0
    while bounded and least > _WHOLE and width + _SPARE < least // 2:
        u, s, vh = _project(matrix, width + _SPARE)
        total = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64).square().unsqueeze(-1)
        missing = (total - s.double().square().cumsum(-1)).clamp_min(0)
        errors = _as_errors(torch.cat([total, missing], dim=-1), total)
        enough = max(1, min(int((errors > tolerance).sum()), width))
        cut = _measured(matrix, _cut(u, s, vh, enough, errors))
        if cut.error > tolerance and enough < width:  # rounding in the sums of squares hid a part of the error
            cut = _measured(matrix, _cut(u, s, vh, width, errors))
        if rank is not None or cut.error <= tolerance:
            return cut
        width *= 2
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _cut(u, s, vh, min(find_rank(s, tolerance), rank or least), tail_errors(s))


def measure_effective_rank(s: Tensor) -> float:
    """Return exp(H), where H is the entropy of singular values (r,) divided by their sum; 0 if all are 0.

    Roy, Vetterli 2007, "The effective rank: a measure of effective dimensionality".
    """
    if not bool(s.any()):
        return 0.0
    return math.exp(float(torch.special.entr(s.double() / s.double().sum()).sum()))


def _cut(u: Tensor, s: Tensor, vh: Tensor, width: int, errors: Tensor) -> Truncation:
    return Truncation(vh[..., :width, :], u[..., :width] * s[..., None, :width], float(errors[width]))


def _measured(matrix: Tensor, cut: Truncation) -> Truncation:
    """Return a truncation with its error measured against the matrix."""
    left_out = torch.linalg.vector_norm(matrix - cut.b @ cut.a, dim=(-2, -1), dtype=torch.float64)
    total = torch.linalg.vector_norm(matrix, dim=(-2, -1), dtype=torch.float64)
    return replace(cut, error=float((left_out / total.clamp_min(torch.finfo(torch.float64).tiny)).amax()))


def find_rank(s: Tensor, tolerance: float) -> int:
    """Return the smallest rank above 0 with an error within a tolerance; components at rounding level do not count."""
    noise = s.shape[-1] * torch.finfo(s.dtype).eps * s.amax(-1, keepdim=True)
    enough = int((tail_errors(s) > tolerance).sum())
    return max(1, min(enough, int((s > noise).sum(-1).amax())))


def tail_errors(s: Tensor) -> Tensor:
    """Return the error of every rank from 0 to r, given all singular values (…, r); for a stack the largest error."""
    squares = s.double().square()
    tails = torch.cat([squares.flip(-1).cumsum(-1).flip(-1), squares.new_zeros(*s.shape[:-1], 1)], dim=-1)
    return _as_errors(tails, tails[..., :1])


def _as_errors(left_out: Tensor, total: Tensor) -> Tensor:
    """Return ‖left out‖ / ‖D‖, given their squares (…, r + 1) and (…, 1); for a stack the largest."""
    shares = (left_out / total.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
    return shares.reshape(-1, shares.shape[-1]).amax(0)


def _project(matrix: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return approximate first singular vectors and values of a matrix, from its projection on ``size`` columns."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(matrix.shape[-1], size, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ noise)[0]
    for _ in range(_ROUNDS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis)[0])[0]
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return basis @ u, s, vh
