"""RandLoRA in NumPy: Albert et al. 2025, section 3, as the sum over its bases, B relabelled to what files hold."""

import math

import numpy as np


def weight(W, p, variant):
    out, columns = W.shape
    small, large = min(out, columns), max(out, columns)
    r, n = variant.r, math.ceil(small / variant.r)
    A = p.randlora_A[:, 0, :small]
    flat = p.randlora_B[:large, :n, :].reshape(large, n * r)
    relabelled = flat.reshape(large, r, n)
    delta = np.zeros((large, small))
    for j in range(n):
        scales = np.diag(p.randlora_lambda[:, j]), np.diag(p.randlora_gamma[j])
        delta += relabelled[:, :, j] @ scales[0] @ A @ scales[1]
    delta = variant.alpha / r * delta
    return W + (delta if columns <= out else delta.T)


def count(out, columns, variant):
    small = min(out, columns)
    return math.ceil(small / variant.r) * (variant.r + small)
