"""CP-LoRA and CP-DoRA in NumPy: arXiv 2508.01772."""

import math

import numpy as np

from tests.oracles._kernels import count_taps


def weight(W, p, variant):
    if hasattr(p, "cp_h"):
        delta = np.einsum("op,ip,up,vp->oiuv", p.cp_out, p.cp_in, p.cp_h, p.cp_w).reshape(W.shape)
    else:
        delta = np.einsum("op,ip->oi", p.cp_out, p.cp_in)
    V = W + variant.alpha / variant.r * delta
    return p.magnitude[:, None] * V / np.sqrt((V**2).sum(axis=1, keepdims=True)) if variant.dora else V


def count(out, columns, variant):
    taps = count_taps(columns)
    inputs = columns // taps + (2 * math.isqrt(taps) if taps > 1 else 0)
    return variant.r * (out + inputs) + (out if variant.dora else 0)
