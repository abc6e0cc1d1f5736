"""DoRA in NumPy: Liu et al. 2024, equation 5, the norm taken per output feature."""

import math

import numpy as np


def weight(W, p, variant):
    scale = variant.alpha / (math.sqrt(variant.r) if variant.rslora else variant.r)
    direction = W + scale * p.lora_B @ p.lora_A
    lengths = np.sqrt(np.sum(direction**2, axis=1, keepdims=True))
    return p.magnitude.reshape(-1, 1) * direction / lengths


def count(out, columns, variant):
    return variant.r * (columns + out) + out
