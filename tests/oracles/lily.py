"""Lily in NumPy: Zhong et al. 2024, section 3, with the router's shares averaged over all tokens, as PEFT does it."""

import numpy as np


def branch(x, y, p, variant):
    hidden = x @ p.lily_A.T
    logits = hidden @ p.lily_router.T
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares = (shares / shares.sum(-1, keepdims=True)).reshape(-1, variant.num_B).mean(0)
    experts = np.split(p.lily_B, variant.num_B)
    return y + variant.scaling * hidden @ sum(share * expert for share, expert in zip(shares, experts, strict=True))


def count(out, columns, variant):
    return variant.r * (columns + variant.num_B * (out + 1))
