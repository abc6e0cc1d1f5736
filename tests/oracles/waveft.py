"""WaveFT in NumPy: Bilican et al. 2025, equation 3, one step of the inverse transform as sums over shifted filters."""

import numpy as np

FIELDS = {"n_frequency": 20, "scaling": 0.5}
R3 = np.sqrt(3)
LOW = {
    "db1": np.array([1, 1]) / np.sqrt(2),
    "db2": np.array([1 + R3, 3 + R3, 3 - R3, 1 - R3]) / (4 * np.sqrt(2)),
}
"""Daubechies 1992, equations 6.1.1 and 6.4.10."""


def weight(W, p, variant):
    change = np.zeros_like(W)
    if not variant.use_idwt:
        for value, i, j in zip(p.waveft_spectrum, *p.indices, strict=True):
            change[i, j] += value
        return W + variant.scaling * change
    low = LOW[variant.wavelet_family]
    taps = len(low)
    high = np.array([(-1) ** n * low[taps - 1 - n] for n in range(taps)])
    padded = [size + taps - 2 + (size + taps - 2) % 2 for size in W.shape]
    for value, i, j in zip(p.waveft_spectrum, *p.indices, strict=True):
        # A coefficient in the lower half of the rows is a detail along the columns of W, and the other way round.
        lower, row = divmod(i + (padded[0] - W.shape[0]) // 2, padded[0] // 2)
        right, column = divmod(j + (padded[1] - W.shape[1]) // 2, padded[1] // 2)
        vertical, horizontal = (high if right else low), (high if lower else low)
        for a in range(taps):
            for b in range(taps):
                x, y = 2 * row + a - (taps - 2), 2 * column + b - (taps - 2)
                if 0 <= x < W.shape[0] and 0 <= y < W.shape[1]:
                    change[x, y] += value * vertical[a] * horizontal[b]
    return W + variant.scaling * change


def count(out, columns, variant):
    return variant.n_frequency
