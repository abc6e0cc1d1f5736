"""GraLoRA in NumPy: Jung et al. 2025, equation 4, block by block, and the hybrid's plain factors."""

import numpy as np

FIELDS = {"r": 6, "k": 3, "hybrid_r": 2}


def weight(W, p, variant):
    k, part = variant.k, variant.r // variant.k
    rows, columns = W.shape[0] // k, W.shape[1] // k
    change = np.zeros_like(W)
    for m in range(k):
        for n in range(k):
            A = p.gralora_A[n][:, m * part : (m + 1) * part].T
            B = p.gralora_B[m][n * part : (n + 1) * part].T
            change[m * rows : (m + 1) * rows, n * columns : (n + 1) * columns] = B @ A
    if variant.hybrid_r:
        change += p.gralora_B_general @ p.gralora_A_general
    return W + variant.alpha / (variant.r + variant.hybrid_r) * change


def count(out, columns, variant):
    return (variant.r + variant.hybrid_r) * (out + columns)
