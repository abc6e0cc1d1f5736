"""Poly in NumPy: Ponti et al. 2022, section 2.2, and the splits of multi-head routing, skill by skill."""

import numpy as np

FIELDS = {"n_splits": 3, "n_skills": 2}


def weight(W, p, variant):
    logits = p.poly_router_module_logits[variant.task].reshape(variant.n_splits, variant.n_skills)
    shares = 1 / (1 + np.exp(-logits))
    shares /= shares.sum(1, keepdims=True) + 1e-12
    down, up = [], []
    for split in range(variant.n_splits):
        down.append(sum(shares[split, s] * p.poly_lora_A[split, s] for s in range(variant.n_skills)))
        up.append(sum(shares[split, s] * p.poly_lora_B[split, s] for s in range(variant.n_skills)))
    return W + (np.concatenate(down) @ np.concatenate(up, 1)).T / variant.r


def count(out, columns, variant):
    skills = variant.n_skills
    return variant.r * skills * (out + columns) + variant.n_tasks * variant.n_splits * skills
