"""DECOR in NumPy: arXiv 2412.09169, one token at a time."""

import numpy as np


def branch(x, y, p, variant):
    answers = np.array(y, copy=True)
    for place in np.ndindex(y.shape[:-1]):
        taken = sum(np.dot(y[place], column) * column for column in p.span.T)
        answers[place] = y[place] - p.rows[place[-1]] * taken
    return answers
