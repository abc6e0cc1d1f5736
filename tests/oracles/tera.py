"""TeRA in NumPy: the network of Gu et al. 2025 as its specification completes it, entry by entry as one sum."""

import string

import numpy as np


def _modes(size, order):
    if order == 1:
        return [size]
    divisor = int(size ** (1 / order) + 1e-9)
    while size % divisor:
        divisor -= 1
    return [divisor, *_modes(size // divisor, order - 1)]


def weight(W, p, variant):
    rows, columns = W.shape
    sizes = [*_modes(rows, variant.order), *_modes(columns, variant.order)]
    d = [getattr(p, f"tera_d_{k}") for k in range(len(sizes))]
    core = p.tera_G[tuple(slice(len(vector)) for vector in d)]
    inner, outer = string.ascii_lowercase[: len(sizes)], string.ascii_uppercase[: len(sizes)]
    terms = [inner]
    operands = [core]
    for k, size in enumerate(sizes):
        drawn = np.eye(size) if variant.factors == "identity" else getattr(p, f"tera_U_{k}")
        U = drawn[:size, : len(d[k])] * np.sqrt(drawn.shape[1] / len(d[k]))  # of variance 1 / R_k, whatever was drawn
        terms += [outer[k] + inner[k], inner[k]]
        operands += [U, d[k]]
    delta = np.einsum(",".join(terms) + "->" + outer, *operands, optimize=True)
    scale = 1 / np.sqrt(columns) if variant.scale is None else variant.scale
    return W + scale * delta.reshape(rows, columns)


def count(out, columns, variant):
    sizes = [*_modes(out, variant.order), *_modes(columns, variant.order)]
    return sum(min(size, variant.r or size) for size in sizes)
