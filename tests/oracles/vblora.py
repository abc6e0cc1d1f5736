"""VB-LoRA in NumPy: Li et al. 2024, section 3, piece by piece."""

import numpy as np

FIELDS = {"vector_length": 3, "num_vectors": 5, "topk": 2}


def _piece(logits, bank, k):
    best = sorted(range(len(logits)), key=lambda i: -logits[i])[:k]
    weights = np.exp([logits[i] - logits[best[0]] for i in best])
    return sum(w * bank[i] for w, i in zip(weights / weights.sum(), best, strict=True))


def weight(W, p, variant):
    v, k, bank = variant.vector_length, variant.topk, p.vblora_vector_bank
    rows, columns = W.shape
    A, B = np.zeros((variant.r, columns)), np.zeros((rows, variant.r))
    for i in range(variant.r):
        for j in range(columns // v):
            A[i, j * v : (j + 1) * v] = _piece(p.vblora_logits_A[i, j], bank, k)
        for j in range(rows // v):
            B[j * v : (j + 1) * v, i] = _piece(p.vblora_logits_B[j, i], bank, k)
    return W + B @ A


def count(out, columns, variant):
    v, h = variant.vector_length, variant.num_vectors
    return h * v + variant.r * h * (columns + out) // v
