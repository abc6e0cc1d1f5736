"""KaSA in NumPy: Wang et al. 2024, equations 5 to 8, one component after the other."""

import numpy as np

# A fresh adapter takes components out: one of a small layer's leaves its output's size to the test.
FIELDS = {"r": 1}


def weight(W, p, variant):
    scale = variant.alpha / (np.sqrt(variant.r) if variant.rslora else variant.r)
    adapted = W.copy()
    for i in range(variant.r):
        adapted -= np.outer(p.start_B[:, i], p.start_A[i])
        adapted += scale * p.lora_diag[i] * np.outer(p.lora_B[:, i], p.lora_A[i])
    return adapted


def count(out, columns, variant):
    return variant.r * (out + columns + 1)
