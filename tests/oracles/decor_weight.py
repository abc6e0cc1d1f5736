"""DECOR's merged form in NumPy: arXiv 2412.09169; a weight that reads embeddings without a span."""

import numpy as np


def weight(W, p, variant):
    return W @ (np.eye(W.shape[1]) - sum(np.outer(column, column) for column in p.span.T))
