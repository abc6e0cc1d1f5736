"""LoRA and rsLoRA in NumPy: Hu et al. 2021, section 4.1; Kalajdzievski 2023, equation 5."""

import math


def scale(variant):
    return variant.alpha / math.sqrt(variant.r) if variant.rslora else variant.alpha / variant.r


def weight(W, p, variant):
    return W + scale(variant) * p.lora_B @ p.lora_A


def bias(b, W, p, variant):
    return b + scale(variant) * p.lora_bias if variant.lora_bias else b


def count(out, columns, variant):
    return variant.r * (columns + out) + (out if variant.lora_bias else 0)
