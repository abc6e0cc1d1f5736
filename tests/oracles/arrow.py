"""Arrow in NumPy: Ostapenko et al. 2024, section 4; token by token and expert by expert."""

import numpy as np

FIELDS = {"train_experts": True}
"""Else nothing is trained."""


def branch(x, y, p, variant):
    answers = y.reshape(-1, y.shape[-1]).copy()
    for t, token in enumerate(x.reshape(-1, x.shape[-1])):
        scores = [abs(np.dot(prototype, token)) for prototype in p.prototypes]
        chosen = sorted(range(len(scores)), key=lambda i: -scores[i])[: variant.top_k]
        shares = [np.exp((scores[i] - scores[chosen[0]]) / variant.temperature) for i in chosen]
        for i, share in zip(chosen, shares, strict=True):
            rows = slice(i * variant.r, (i + 1) * variant.r)
            answers[t] += share / sum(shares) * (p.lora_B[:, rows] @ (p.lora_A[rows] @ token))
    return answers.reshape(y.shape)


def count(out, columns, variant):
    return variant.experts * variant.r * (columns + out) if variant.train_experts else 0
