"""AutoLoRA's fusion in NumPy: Li et al. 2025, section 3; token by token and LoRA by LoRA."""

import numpy as np


def normed(v, weight, bias):
    return (v - v.mean()) / np.sqrt(v.var() + 1e-5) * weight + bias


def branch(x, o, p, variant):
    answers = o.reshape(-1, o.shape[-1]).copy()
    for t, token in enumerate(x.reshape(-1, x.shape[-1])):
        output = answers[t].copy()
        for i in range(variant.experts):
            rows = slice(i * variant.r, (i + 1) * variant.r)
            one = p.lora_B[:, rows] @ (p.lora_A[rows] @ token)
            heard = normed(one, p.norm_lora_weight, p.norm_lora_bias)
            z = p.weight_lora * heard + p.bias
            if variant.base:
                z = z + p.weight_base * normed(output, p.norm_base_weight, p.norm_base_bias)
            if variant.cross:
                z = z + p.weight_cross * normed(output, p.norm_base_weight, p.norm_base_bias) * heard
            answers[t] += p.weight_out * one / (1 + np.exp(-z))
    return answers.reshape(o.shape)


def count(out, columns, variant):
    vectors = 3 + variant.base + variant.cross + 2 + 2 * (variant.base or variant.cross)
    return vectors * out
