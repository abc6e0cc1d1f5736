"""LoRA-C and DoRA-C in NumPy, entry by entry: arXiv 2410.16954 in loralib's layout; arXiv 2508.01772."""

import math

import numpy as np

from tests.oracles._kernels import count_taps


def weight(W, p, variant):
    product = p.lora_B @ p.lora_A
    width = product.shape[1]
    delta = np.empty_like(W)
    for o in range(len(W)):
        for column in range(W.shape[1]):
            f = o * W.shape[1] + column
            delta[o, column] = variant.alpha / variant.r * product[f // width, f % width]
    V = W + delta
    return p.magnitude[:, None] * V / np.linalg.norm(V, axis=1, keepdims=True) if variant.dora else V


def count(out, columns, variant):
    k = math.isqrt(count_taps(columns))
    return variant.r * k * k * (columns // k**2 + out) + (out if variant.dora else 0)
