"""ReMix in NumPy: Qiu et al. 2026, section 3 as it is deployed; token by token and expert by expert."""

import numpy as np

FIELDS = {"experts": 3, "top_k": 2}


def branch(x, y, p, variant):
    n, k, r = variant.experts, variant.top_k, variant.r
    omega = variant.alpha / (np.sqrt(k * r) if variant.rslora else k * r)
    answers = y.reshape(-1, y.shape[-1]).copy()
    for t, token in enumerate(x.reshape(-1, x.shape[-1])):
        z = p.router @ token
        for i in sorted(range(n), key=lambda i: -z[i])[:k]:
            rows = slice(i * r, (i + 1) * r)
            answers[t] += omega * (p.lora_B[:, rows] @ (p.lora_A[rows] @ token))
    return answers.reshape(y.shape)


def count(out, columns, variant):
    return variant.experts * variant.r * (out + columns) + variant.experts * columns
