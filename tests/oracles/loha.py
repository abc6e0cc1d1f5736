"""LoHa in NumPy: W + (α/r)·(w1a·w1b)∘(w2a·w2b); FedPara's proposition 3 for kernels in three factors."""

import numpy as np

from tests.oracles._kernels import count_taps


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
    taps = count_taps(columns)
    if variant.effective_conv2d and taps > 1:
        return 2 * (r * out + r * columns // taps + r * r * taps)
    return 2 * r * (out + columns)
