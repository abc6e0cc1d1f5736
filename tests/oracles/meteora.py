"""MeteoRA in NumPy: Xu et al. 2024, section 3; token by token and expert by expert, as the paper writes it."""

import numpy as np


def chosen(z, variant):
    """The experts of one token, best first (a stable sort: ties to the lowest index), and their weights."""
    experts = sorted(range(len(z)), key=lambda i: -z[i])[: variant.top_k]
    exponentials = [np.exp((z[i] - z[experts[0]]) / variant.temperature) for i in experts]
    return experts, np.array(exponentials) / sum(exponentials)


def branch(x, y, p, variant):
    answers = y.reshape(-1, y.shape[-1]).copy()
    for t, token in enumerate(x.reshape(-1, x.shape[-1])):
        for i, w in zip(*chosen(p.moe_gate @ token, variant), strict=True):
            rows = slice(i * variant.r, (i + 1) * variant.r)
            answers[t] += w * variant.alpha / variant.r * (p.lora_B[:, rows] @ (p.lora_A[rows] @ token))
    return answers.reshape(y.shape)


def count(out, columns, variant):
    trained = variant.experts * columns
    return trained + variant.experts * variant.r * (columns + out) if variant.train_experts else trained
