"""AdaLoRA in NumPy: Zhang et al. 2023, W + P·Λ·Q, with the scale that PEFT gives it."""

import numpy as np


def weight(W, p, variant):
    singular = np.diag(p.lora_E[:, 0])
    return W + variant.alpha / (variant.r + 1e-5) * p.lora_B @ singular @ p.lora_A


def count(out, columns, variant):
    return variant.r * (out + columns + 1)
