"""HRA in NumPy: Yuan et al. 2024, equations 2 and 3, reflection by reflection; Gram-Schmidt column by column."""

import numpy as np

# Only pairs of reflections can be brought near the identity; tests/variants/test_hra.py has the rest.
FIELDS = {"r": 2, "apply_GS": False}


def _columns(u, orthonormal):
    found = []
    for original in u.T:
        column = original
        if orthonormal:
            for other in found:
                column = column - (other @ column) * other
        found.append(column / np.linalg.norm(column))
    return found


def weight(W, p, variant):
    adapted = W.copy()
    for u in _columns(p.hra_u, variant.apply_GS):
        adapted = adapted @ (np.eye(len(u)) - 2 * np.outer(u, u))
    return adapted


def count(out, columns, variant):
    return columns * variant.r
