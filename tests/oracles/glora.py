"""GLoRA in NumPy: each tap of the kernel has a matrix (out, channels), which A mixes."""

import numpy as np

from tests.oracles._kernels import count_taps


def weight(W, p, variant):
    channels = p.a1.shape[0]
    taps = W.reshape(len(W), channels, -1)
    mixed = np.stack([taps[:, :, t] @ (p.a1 @ p.a2) for t in range(taps.shape[2])], axis=2)
    return W + variant.alpha / variant.r * (mixed.reshape(W.shape) + p.b1 @ p.b2)


def count(out, columns, variant):
    channels = columns // count_taps(columns)
    return variant.r * (2 * channels + columns + out)
