"""FlyLoRA in NumPy: Zou et al. 2025, section 3; token by token and rank by rank."""

import numpy as np

FIELDS = {"top_k": 2}


def branch(x, y, p, variant):
    answers = y.reshape(-1, y.shape[-1]).copy()
    d = p.lora_topk_bias if variant.top_k < variant.r else np.zeros(variant.r)
    for t, token in enumerate(x.reshape(-1, x.shape[-1])):
        u = [row @ token for row in p.lora_A]
        score = [abs(v + b) if variant.absolute else v + b for v, b in zip(u, d, strict=True)]
        for i in sorted(range(variant.r), key=lambda i: -score[i])[: variant.top_k]:
            answers[t] += variant.alpha / variant.r * u[i] * p.lora_B[:, i]
    return answers.reshape(y.shape)


def count(out, columns, variant):
    return out * variant.r
