"""Uni-LoRA in NumPy: Li et al. 2025, equation 2: the factors' entries are a projection of one vector."""

import numpy as np

FIELDS = {"theta_d_length": 11}


def weight(W, p, variant):
    out, columns = W.shape
    projection = np.zeros((variant.r * (out + columns), variant.theta_d_length))
    for entry, (place, scale) in enumerate(zip(p.unilora_places[0], p.unilora_scales, strict=True)):
        projection[entry, place % variant.theta_d_length] = scale
    entries = projection @ p.unilora_theta_d
    down, up = entries[: variant.r * columns], entries[variant.r * columns :]
    return W + up.reshape(out, variant.r) @ down.reshape(variant.r, columns)


def count(out, columns, variant):
    return variant.theta_d_length
