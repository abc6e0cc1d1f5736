"""DeLoRA in NumPy: Bini et al. 2025, equation 6, one normalised pair after the other."""

import numpy as np


def weight(W, p, variant):
    adapted = W.copy()
    for i in range(variant.r):
        a, b = p.delora_A[i], p.delora_B[:, i]
        size = max(np.linalg.norm(a), 1e-4) * max(np.linalg.norm(b), 1e-4)
        adapted += p.delora_lambda / variant.r * np.outer(b, a) / size * p.delora_w_norm
    return adapted


def count(out, columns, variant):
    return variant.r * (out + columns) + 1
