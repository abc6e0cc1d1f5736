"""VeRA in NumPy: Kopiczko et al. 2024, equation 2, with its diagonal matrices written out."""

import numpy as np


def weight(W, p, variant):
    rows, columns = W.shape
    b, d = np.diag(p.vera_lambda_b), np.diag(p.vera_lambda_d)
    return W + b @ p.vera_B[:rows, :] @ d @ p.vera_A[:, :columns]


def count(out, columns, variant):
    return out + variant.r
