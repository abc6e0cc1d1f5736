"""DEFT and PaRa in NumPy: W' = (I − P_proj)·W + Q·R as PEFT states it, Gram-Schmidt column by column for qr."""

import numpy as np

FIELDS = {"alpha": 5.0}


def _orthonormal(columns):
    found = []
    for original in columns.T:
        column = original
        for other in found:
            column = column - (other @ column) * other
        found.append(column / np.linalg.norm(column))
    return np.stack(found, axis=1)


def weight(W, p, variant):
    out, rank = p.deft_P.shape
    if variant.decomposition_method == "qr":
        q = _orthonormal(p.deft_P)
        projector = q @ q.T
        q = np.linalg.qr(p.deft_P)[0]  # the injection also depends on the signs of the columns
    else:
        q = p.deft_P
        projector = q @ np.maximum(q, 0).T
    kept = (np.eye(out) - projector) @ W
    return kept if variant.para else kept + q @ p.deft_R * variant.alpha / rank


def count(out, columns, variant):
    return out * variant.r + (0 if variant.para else variant.r * columns)
