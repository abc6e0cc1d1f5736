"""(IA)³ in NumPy: Liu et al. 2022, section 3.3, as weights; the vector's orientation tells which side is scaled."""

import numpy as np


def _scales_input(p):
    return p.ia3_l.shape[0] == 1


def weight(W, p, variant):
    if not _scales_input(p):
        return np.diag(p.ia3_l.ravel()) @ W
    positions = W.shape[1] // p.ia3_l.size
    return W @ np.diag(np.repeat(p.ia3_l.ravel(), positions))


def bias(b, W, p, variant):
    return b if _scales_input(p) or not variant.scales_bias else p.ia3_l.ravel() * b


def count(out, columns, variant):
    return out
