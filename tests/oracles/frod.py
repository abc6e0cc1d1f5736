"""FRoD in NumPy: the weight from its two bases and the entries between them, one by one (arXiv 2512.23485)."""

import numpy as np

FIELDS = {"sparse_rate": 0.2}


def weight(W, p, variant):
    core = np.diag(p.frod_lambda_l).copy()
    if variant.sparse_rate:
        for row, column, value in zip(*p.frod_s_indices, p.frod_lambda_s_values, strict=True):
            assert row != column
            core[row, column] += value
    return p.frod_U @ core @ p.frod_V.T


def count(out, columns, variant):
    sparse = int(columns**2 * variant.sparse_rate)
    return columns + (min(max(1, sparse), columns**2 - columns) if variant.sparse_rate else 0)
