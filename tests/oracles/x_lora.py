"""X-LoRA in NumPy: arXiv 2402.07148 and PEFT's XLORA, token by token and expert by expert."""

import numpy as np


def softmax(z):
    exponentials = np.exp(z - z.max())
    return exponentials / exponentials.sum()


def scalings(logits, variant):
    """What one token's experts weigh, of what the classifier gives (experts,)."""
    weights = softmax(logits / variant.softmax_temperature) if variant.enable_softmax else logits.copy()
    if variant.top_k_lora is not None:
        kept = sorted(range(len(weights)), key=lambda i: -weights[i])[: variant.top_k_lora]
        weights = np.array([w if i in kept else 0.0 for i, w in enumerate(weights)])
    if variant.enable_softmax_topk:
        left = weights != 0
        weights[left] = softmax(weights[left])
    return weights


def classified(h, layers):
    """What the classifier gives of one token's hidden state; layers are pairs of weight and bias."""
    for j, (weight, bias) in enumerate(layers):
        h = weight @ (np.maximum(h, 0) if j else h) + bias
    return h


def site(x, y, a, b, weights, variant):
    """y' of one token."""
    for i, w in enumerate(weights):
        rows = slice(i * variant.r, (i + 1) * variant.r)
        y = y + variant.global_scaling_weight * w * (b[:, rows] @ (a[rows] @ x))
    return y
