"""BD-LoRA in NumPy: Wang et al. 2025, section 3, the blocks put on the diagonal one by one."""

import numpy as np

FIELDS = {"r": 6, "nblocks": 3, "target_modules_bd_a": ("site", "first"), "target_modules_bd_b": ("second",)}


def _diagonal(stacked, columns):
    width = stacked.shape[1]
    count, height = columns // width, len(stacked) * width // columns
    matrix = np.zeros((len(stacked), columns))
    for i in range(count):
        at = slice(i * height, (i + 1) * height)
        matrix[at, i * width : (i + 1) * width] = stacked[at]
    return matrix


def weight(W, p, variant):
    scale = variant.alpha / (np.sqrt(variant.r) if variant.rslora else variant.r)
    return W + scale * _diagonal(p.lora_B, variant.r) @ _diagonal(p.lora_A, W.shape[1])


def count(out, columns, variant):
    return variant.r * (out + columns // variant.nblocks)
