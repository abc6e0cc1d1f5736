"""PSOFT in NumPy: Wu et al. 2025, equations 6 to 8, with Cayley's transform or its series term by term."""

import numpy as np


def _rotation(upper, variant):
    q = np.zeros((variant.r, variant.r))
    q[np.triu_indices(variant.r, 1)] = upper
    q = q - q.T
    eye = np.eye(variant.r)
    if not variant.use_cayley_neumann:
        return (eye + q) @ np.linalg.inv(eye - q)
    if variant.cayley_neumann_eps is not None and np.linalg.norm(q) > variant.cayley_neumann_eps:
        q = q * variant.cayley_neumann_eps / np.linalg.norm(q)
    last = variant.num_cayley_neumann_terms - 1
    powers = [np.linalg.matrix_power(q, n) for n in range(last + 1)]
    return eye + 2 * sum(powers[1:last]) + powers[last]


def weight(W, p, variant):
    core = _rotation(getattr(p, "psoft_R", []), variant) if variant.psoft_orth else p.psoft_R
    core = np.diag(p.psoft_b) @ core if variant.psoft_mag_b else core
    core = core @ np.diag(p.psoft_a) if variant.psoft_mag_a else core
    return W + variant.alpha / variant.r * p.psoft_B @ (core - np.eye(variant.r)) @ p.psoft_A


def count(out, columns, variant):
    core = variant.r * (variant.r - 1) // 2 if variant.psoft_orth else variant.r**2
    return core + variant.r * (variant.psoft_mag_a + variant.psoft_mag_b)
