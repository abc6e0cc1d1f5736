"""RoAd in NumPy: Liao and Monz 2024, equation 4, each pair's rotation written into one matrix R."""

import numpy as np

FIELDS = {"group_size": 2}


def _rotation(out, p, variant):
    R, half = np.zeros((out, out)), variant.group_size // 2
    for i in range(out):
        group, place = divmod(i, variant.group_size)
        j = i + half if place < half else i - half  # the other of the pair
        sign = -1 if place < half else 1
        if variant.variant == "road_1":
            cosine = sine = group * half + place % half
        elif variant.variant == "road_2":
            cosine = sine = i
        else:
            cosine = group * 2 * variant.group_size + place
            sine = cosine + variant.group_size
        R[i, i] = p.road_alpha[cosine] * np.cos(p.road_theta[cosine])
        R[i, j] = sign * p.road_alpha[sine] * np.sin(p.road_theta[sine])
    return R


def weight(W, p, variant):
    return _rotation(len(W), p, variant) @ W


def bias(b, W, p, variant):
    return _rotation(len(b), p, variant) @ b


def count(out, columns, variant):
    return 2 * int(out * {"road_1": 0.5, "road_2": 1, "road_4": 2}[variant.variant])
