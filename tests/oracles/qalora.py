"""QA-LoRA in NumPy: Xu et al. 2023, algorithm 1, with each group's sum of inputs written out; the scale is PEFT's."""

import numpy as np

FIELDS = {"group_size": 1}


def weight(W, p, variant):
    g, groups = variant.group_size, W.shape[1] // variant.group_size
    pool = np.zeros((groups, W.shape[1]))
    for group in range(groups):
        pool[group, group * g : (group + 1) * g] = 1 / g
    scale = variant.alpha / (variant.r**0.5 if variant.rslora else variant.r)
    return W + scale * p.lora_B @ p.lora_A @ (groups * pool)


def count(out, columns, variant):
    return variant.r * (out + columns // variant.group_size)
