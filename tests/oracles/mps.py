"""MPS adaptation in NumPy: Chen et al. 2026, entry by entry from the two cores."""

import numpy as np


def weight(W, p, variant):
    first = variant.rank_leg == "first"
    d1, d2 = p.mps_g1.shape[-2], p.mps_g2.shape[1]
    A = np.empty((variant.r, d1 * d2))
    for rank in range(variant.r):
        for a in range(d1):
            for b in range(d2):
                left = p.mps_g1[rank, a] if first else p.mps_g1[a]
                right = p.mps_g2[:, b] if first else p.mps_g2[:, b, rank]
                A[rank, a * d2 + b] = np.sum(left * right)
    return W + variant.alpha / variant.r * p.lora_B @ A


def count(out, columns, variant):
    # The most even split, the smaller half on the core with the rank.
    d1 = max(d for d in range(1, columns + 1) if columns % d == 0 and d * d <= columns)
    return variant.r * d1 * variant.chi + variant.chi * (columns // d1) + out * variant.r
