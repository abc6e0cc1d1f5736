"""Magnitudes in NumPy: rows, or the columns of a channel together, have the trained lengths."""

import numpy as np

from tests.oracles._kernels import count_taps


def weight(W, p, variant):
    if not variant.columns:
        return W * (p.magnitude / np.sqrt(np.sum(W**2, axis=1)))[:, None]
    taps = W.shape[1] // p.magnitude.size
    changed = np.array(W, copy=True)
    for channel, length in enumerate(p.magnitude):
        columns = slice(channel * taps, (channel + 1) * taps)
        changed[:, columns] *= length / np.sqrt(np.sum(W[:, columns] ** 2))
    return changed


def count(out, columns, variant):
    return columns // count_taps(columns) if variant.columns else out
