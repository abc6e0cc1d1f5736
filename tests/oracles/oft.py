"""OFT in NumPy: Qiu et al. 2023, section 3, and the series of OFTv2, block by block and term by term."""

import numpy as np

# r is the number of blocks here, 3 and 1, as every host can have it; eps is such that coft can move something.
FIELDS = {"block_size": 0, "eps": 1.5}


def rotation(row, rows, variant):
    size = round((1 + np.sqrt(1 + 8 * row.size)) / 2)
    q = np.zeros((size, size))
    values = iter(row)
    for i in range(size):
        for j in range(i + 1, size):
            q[i, j] = next(values)
            q[j, i] = -q[i, j]
    if variant.coft:
        q *= min(1.0, variant.eps / np.sqrt(rows) / max(np.linalg.norm(q), 1e-300))
    eye = np.eye(size)
    if not variant.use_cayley_neumann:
        return (eye - q) @ np.linalg.inv(eye + q)
    last = max(variant.num_cayley_neumann_terms, 4) - 1 if variant.num_cayley_neumann_terms > 2 else None
    if last is None:
        return eye if variant.num_cayley_neumann_terms == 1 else eye + 2 * q
    middle = sum(2 * np.linalg.matrix_power(q, n) for n in range(1, last))
    return eye + middle + np.linalg.matrix_power(q, last)


def weight(W, p, variant):
    embedding = hasattr(p, "oft_embedding_R")
    stored = p.oft_embedding_R if embedding else p.oft_R
    blocks = [rotation(row, len(stored), variant) for row in stored]
    size, width = len(blocks[0]), W.shape[0] if embedding else W.shape[1]
    R = np.zeros((width, width))
    for i in range(width // size):
        R[i * size : (i + 1) * size, i * size : (i + 1) * size] = blocks[i % len(blocks)]
    return (W.T @ R).T if embedding else W @ R.T


def count(out, columns, variant):
    # An embedding (13 ids) is rotated in its own 6 dimensions.
    width = out if columns == 13 else columns
    blocks = min((d for d in range(1, width + 1) if width % d == 0), key=lambda d: (abs(d - variant.r), d))
    size = width // blocks
    return (1 if variant.block_share else blocks) * size * (size - 1) // 2
