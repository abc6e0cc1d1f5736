"""BOFT in NumPy: Liu et al. 2023, section 4, with the permutations written out as matrices."""

import numpy as np

FIELDS = {"block_size": 3}


def permutation(width, size, i):
    """P_i, P_i[a, perm_i[a]] = 1."""
    group, unit = 2**i * size, size // 2
    order = list(range(width))
    if i > 0:
        order = []
        for start in range(0, width, group):
            units = [list(range(start + u, start + u + unit)) for u in range(0, group, unit)]
            order += [column for chosen in (units[0::2], units[1::2]) for one in chosen for column in one]
    P = np.zeros((width, width))
    P[np.arange(width), order] = 1
    return P


def rotation(boft_R):
    m, number, size, _ = boft_R.shape
    R, eye = np.eye(number * size), np.eye(size)
    for i in range(m):
        D = np.zeros_like(R)
        for k in range(number):
            S = 0.5 * (boft_R[i, k] - boft_R[i, k].T)
            D[k * size : (k + 1) * size, k * size : (k + 1) * size] = (eye - S) @ np.linalg.inv(eye + S)
        P = permutation(number * size, size, i)
        R = P @ D @ P.T @ R
    return R


def weight(W, p, variant):
    R = rotation(p.boft_R)
    return np.diag(p.boft_s.ravel()) @ (R @ W if variant.rotates_output else W @ R.T)


def count(out, columns, variant):
    width = out if variant.rotates_output else columns
    size = variant.block_size or width // variant.block_num
    return variant.n_butterfly_factor * width * size + out
