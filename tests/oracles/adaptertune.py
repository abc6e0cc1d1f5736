"""AdapterTune in NumPy: arXiv 2603.14706, the adapter after a block; x is the block's input, h its output."""

import math

import numpy as np

_erf = np.vectorize(math.erf)


def gelu(z):
    return z * 0.5 * (1 + _erf(z / math.sqrt(2)))


def branch(x, h, p, variant):
    return h + variant.alpha * (gelu(h @ p.down.T + p.down_bias) @ p.up.T + p.up_bias)


def count(out, columns, variant):
    return 2 * out * variant.r + variant.r + out
