"""GLoRA in NumPy: Chavan et al. 2023, equation 6, with A as a matrix of factors of W's entries."""

import numpy as np


def _change(p, name, shape):
    tensors = vars(p)
    if f"glora_{name}_Xd" in tensors:
        return tensors[f"glora_{name}_Xd"] @ tensors[f"glora_{name}_Xu"]
    return np.broadcast_to(tensors.get(f"glora_{name}_X", 0.0), shape)


def weight(W, p, variant):
    return W + W * _change(p, "A", W.shape) + _change(p, "B", W.shape)


def bias(b, W, p, variant):
    offset = _change(p, "C", (W.shape[1], 1))
    return b + b * _change(p, "D", b.shape) + _change(p, "E", b.shape) + (W @ offset).ravel()


def count(out, columns, variant):
    return 2 * variant.r * (out + columns) + variant.r * (columns + 1) + 2
