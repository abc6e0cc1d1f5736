"""PVeRA in NumPy: the mean of the learned distribution (arXiv 2512.07703, section 3), token by token."""

import numpy as np


def branch(x, y, p, variant):
    columns, rows, r = x.shape[-1], y.shape[-1], variant.r
    mean = np.diag(p.pvera_lambda_d[:r]) @ p.pvera_A[:r, :columns] @ x.reshape(-1, columns).T
    return y + (np.diag(p.pvera_lambda_b) @ p.pvera_B[:rows] @ mean).T.reshape(y.shape)


def weight(W, p, variant):
    rows, columns = W.shape
    r, b = variant.r, np.diag(p.pvera_lambda_b)
    return W + b @ p.pvera_B[:rows] @ np.diag(p.pvera_lambda_d[:r]) @ p.pvera_A[:r, :columns]


def count(out, columns, variant):
    return out + 2 * variant.r
