"""C3A in NumPy: Chen et al. 2024, block by block; each row of a block is the row above, turned by one place."""

import numpy as np

# A fresh adapter is random: blocks that divide the kit's layers.
FIELDS = {"block_size": 3}


def weight(W, p, variant):
    adapted, b = W.copy(), variant.block_size
    for m, row in enumerate(p.c3a_kernel):
        for n, vector in enumerate(row):
            block = np.stack([np.roll(vector, i) for i in range(b)])
            adapted[m * b : (m + 1) * b, n * b : (n + 1) * b] += block / W.shape[1]
    return adapted


def count(out, columns, variant):
    return out * columns // variant.block_size
