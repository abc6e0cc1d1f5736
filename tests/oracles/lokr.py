"""LoKr in NumPy, entry by entry: ΔW[i·k + p, j·n + q] = (α/r)·w1[i, j]·w2[p, q], kernels flattened in w2."""

import numpy as np

from tests.oracles._kernels import count_taps


def whole(p, name):
    if hasattr(p, name):
        return getattr(p, name)
    a, b = getattr(p, f"{name}_a"), getattr(p, f"{name}_b")
    core = getattr(p, "lokr_t2", None)
    if name == "lokr_w1" or core is None:
        return np.einsum("pr,rq->pq", a, b)
    return np.einsum("ijt,ip,jq->pqt", core, a, b).reshape(a.shape[1], -1)


def weight(W, p, variant):
    w1, w2 = whole(p, "lokr_w1"), whole(p, "lokr_w2")
    if w2.ndim == 3:  # of PEFT's Conv1d: W[·] in the order of axes k, l, n, m, taps
        product = np.einsum("ij,pqt->piqjt", w1, w2)
        return W + variant.alpha / variant.r * product.reshape(W.shape)
    product = np.einsum("ij,pq->ipjq", w1, w2)
    return W + variant.alpha / variant.r * product.reshape(W.shape)


def nearest(number):
    """The divisors nearest to the square root, the smaller first."""
    return max((d, number // d) for d in range(1, number + 1) if number % d == 0 and d * d <= number)


def count(out, columns, variant):
    r, taps = variant.r, count_taps(columns)
    rows, height = nearest(out)
    blocks, width = nearest(columns // taps)
    first, second = rows * blocks, height * width * taps
    if variant.decompose_both and r < max(rows, blocks) / 2:
        first = r * (rows + blocks)
    if r < max(height, width) / 2:
        effective = variant.effective_conv2d and taps > 1
        second = r * (height + width) + r * r * taps if effective else r * (height + width * taps)
    return first + second
