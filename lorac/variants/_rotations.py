"""Rotations from skew-symmetric matrices, in blocks.

Cayley's transform, and the series that approximates it: Qiu et al. 2025 (OFTv2), arXiv 2506.19847.
"""

import torch
from torch import Tensor


def skew(upper: Tensor, size: int) -> Tensor:
    """Return skew-symmetric matrices (n, size, size) from their upper triangles (n, size·(size − 1)/2), row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    empty = upper.new_zeros(upper.shape[0], size, size)
    half = torch.index_put(empty, (torch.arange(len(upper), device=upper.device)[:, None], rows, columns), upper)
    return half - half.transpose(1, 2)


def cayley(q: Tensor) -> Tensor:
    """Return (I − Q)·(I + Q)⁻¹ of skew-symmetric matrices (n, size, size)."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    return torch.linalg.solve(eye + q, eye - q, left=False)


def neumann(q: Tensor, terms: int) -> Tensor:
    """Return I + 2Q + 2Q² + … + 2Q^{t−2} + Q^{t−1}, near (I + Q)·(I − Q)⁻¹; as in PEFT, three terms are four."""
    total = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device).expand_as(q)
    if terms > 1:
        total = total + 2 * q
    if terms > 2:
        power = q @ q
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ q
            total = total + 2 * power
        total = total + power @ q
    return total
