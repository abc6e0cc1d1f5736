"""A LoRA on the residual of W in NumPy."""

import numpy as np


def weight(W, p, variant):
    rest = W - np.matmul(p.start_B, p.start_A)
    return rest + variant.method.alpha / variant.method.r * np.matmul(p.lora_B, p.lora_A)


def count(out, columns, variant):
    return variant.method.r * (columns + out)
