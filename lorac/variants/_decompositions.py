"""Rotations from skew-symmetric matrices, in blocks, and singular vectors of base weights.

Cayley's transform, and the series that approximates it: Qiu et al. 2025 (OFTv2), arXiv 2506.19847.
"""

import torch

from lorac.errors import SiteError
from lorac.variants.base import Site, Tensor


def skew(upper: Tensor, size: int) -> Tensor:
    """Return skew-symmetric matrices (n, size, size) from their upper triangles (n, size·(size − 1)/2), row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    empty = upper.new_zeros(upper.shape[0], size * size)
    # On a CPU this takes half of the time of index_put, backwards too.
    half = torch.scatter(empty, 1, (rows * size + columns).expand_as(upper), upper).view(-1, size, size)
    return half - half.transpose(1, 2)


def cayley(q: Tensor) -> Tensor:
    """Return (I − Q)·(I + Q)⁻¹ of skew-symmetric matrices (n, size, size)."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    return torch.linalg.solve(eye + q, eye - q, left=False)


def neumann(q: Tensor, terms: int) -> Tensor:
    """Return I + 2Q + 2Q² + … + 2Q^{t−2} + Q^{t−1}, near (I + Q)·(I − Q)⁻¹; as in PEFT, three terms are four."""
    total = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if terms > 1:
        total = torch.add(total, q, alpha=2)
    if terms > 2:
        power = q @ q
        total = torch.add(total, power, alpha=2)
        for _ in range(3, terms - 1):
            power = power @ q
            total = torch.add(total, power, alpha=2)
        total = total + power @ q
    return total


def require_rank(method: str, rank: int, site: Site) -> None:
    """Refuse a site whose weight has fewer singular vectors than the method's rank."""
    most = min(site.out_features, site.in_features)
    if rank > most:
        raise SiteError(
            f"the weight of '{site.path}' ({site.in_features} -> {site.out_features}) has fewer than the {rank} "
            f"singular vectors that {method} needs",
            nearest=f"r={most}",
            next_step="give a smaller r, or add the module to exclude=",
        )


def truncated_svd(W: Tensor, r: int, *, rounds: int | None = None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (out, r), S (r,) and Vᵀ (r, in) of W, in float32 as PEFT computes them.

    Args:
        rounds: rounds of subspace iteration from r random columns (Halko et al. 2009, algorithm 4.4); None: the full
            SVD.
        seed: seed of these columns, which torch.svd_lowrank draws after torch.manual_seed.
    """
    W = W.float()
    if rounds is None:
        u, s, vh = torch.linalg.svd(W, full_matrices=False)
        return u[:, :r], s[:r], vh[:r]
    if W.shape[0] < W.shape[1]:
        u, s, vh = truncated_svd(W.t(), r, rounds=rounds, seed=seed)
        return vh.t(), s, u.t()
    basis = torch.linalg.qr(W @ torch.randn(W.shape[1], r, generator=torch.Generator().manual_seed(seed))).Q
    for _ in range(rounds):
        basis = torch.linalg.qr(W @ torch.linalg.qr(W.t() @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.t() @ W, full_matrices=False)
    return basis @ u, s, vh
