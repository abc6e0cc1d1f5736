"""Singular vectors of base weights, for methods between frozen factors."""

import torch

from lorac.errors import SiteError
from lorac.variants.base import Site, Tensor


def require_rank(method: str, rank: int, site: Site) -> None:
    """Refuse a site whose weight has fewer singular vectors than the method's rank."""
    most = min(site.out_features, site.in_features)
    if rank > most:
        raise SiteError(
            f"the weight of '{site.path}' ({site.in_features} -> {site.out_features}) has fewer than the {rank} "
            f"singular vectors that {method} needs",
            nearest=f"r={most}",
            next_step="give a smaller r, or exclude= the module",
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
