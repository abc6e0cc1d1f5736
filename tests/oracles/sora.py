"""SoRA in NumPy: Ding et al. 2023, section 3; one rank after the other, each behind its gate."""

import numpy as np


def weight(W, p, variant):
    adapted = W.copy()
    for i, gate in enumerate(p.gate):
        adapted += variant.alpha / variant.r * gate * np.outer(p.lora_B[:, i], p.lora_A[i])
    return adapted


def count(out, columns, variant):
    return variant.r * (columns + out) + variant.r
