"""Hydra in NumPy: Kim et al. 2023; the forward pass, and the merged weight and bias it equals."""

import numpy as np


def _biases(p, variant):
    """c_p, e_p, c_s, e_s."""
    names = ("parallel_down_bias", "parallel_up_bias", "sequential_down_bias", "sequential_up_bias")
    sizes = (len(p.parallel_down), len(p.parallel_up), len(p.sequential_down), len(p.sequential_up))
    return [getattr(p, n) if variant.branch_bias else np.zeros(size) for n, size in zip(names, sizes, strict=True)]


def branch(x, z, p, variant):
    c_p, e_p, c_s, e_s = _biases(p, variant)
    parallel = (x @ p.parallel_down.T + c_p) @ p.parallel_up.T + e_p
    sequential = (z @ p.sequential_down.T + c_s) @ p.sequential_up.T + e_s
    return z + variant.scale * (parallel + sequential)


def weight(W, p, variant):
    return W + variant.scale * (p.parallel_up @ p.parallel_down + p.sequential_up @ (p.sequential_down @ W))


def bias(b, W, p, variant):
    c_p, e_p, c_s, e_s = _biases(p, variant)
    sequential = p.sequential_up @ (p.sequential_down @ b + c_s) + e_s
    return b + variant.scale * (p.parallel_up @ c_p + e_p + sequential)


def count(out, columns, variant):
    r_p, r_s = variant.r, variant.r_sequential
    without = r_p * (columns + out) + 2 * r_s * out
    return without + r_p + out + r_s + out if variant.branch_bias else without
