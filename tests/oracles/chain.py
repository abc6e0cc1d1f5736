"""A LoRA and a DoRA on its result in NumPy: every equation reads the weight that the one before left."""

import numpy as np


def weight(W, p, variant):
    tensors = vars(p)
    W = W + variant.parts[0].alpha / variant.parts[0].r * tensors["part0_lora_B"] @ tensors["part0_lora_A"]
    W = W + variant.parts[1].alpha / variant.parts[1].r * tensors["part1_lora_B"] @ tensors["part1_lora_A"]
    return tensors["part1_magnitude"][:, None] * W / np.linalg.norm(W, axis=1, keepdims=True)


def count(out, columns, variant):
    return sum(part.r * (columns + out) for part in variant.parts) + out
