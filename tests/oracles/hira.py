"""HiRA in NumPy: Huang et al. 2025: the update is the Hadamard product of W and a low-rank matrix."""

import numpy as np


def weight(W, p, variant):
    update = np.zeros_like(W)
    for column, row in zip(p.hira_B.T, p.hira_A, strict=True):
        update += W * np.outer(column, row)
    return W + update


def count(out, columns, variant):
    return variant.r * (out + columns)
