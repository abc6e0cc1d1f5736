"""Learned concatenation in NumPy: Prabhakar et al. 2024, equation of CAT; one LoRA after the other."""

import numpy as np


def weight(W, p, variant):
    adapted = W.copy()
    for i, share in enumerate(p.weights):
        rows = slice(i * variant.r, (i + 1) * variant.r)
        adapted += share * np.matmul(p.lora_B[:, rows], p.lora_A[rows])
    return adapted


def count(out, columns, variant):
    return variant.experts + (variant.experts * variant.r * (columns + out) if variant.train_experts else 0)
