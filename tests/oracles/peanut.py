"""PEANuT in NumPy: Zhong et al. 2024, equations 4 and 7, on the columns of W one after the other."""

import numpy as np


def _network(column, p, depth):
    kept = [np.maximum(p.peanut_A @ column, 0)]
    for encoder in [*p.peanut_encoders] if depth else []:
        kept.append(np.maximum(encoder @ kept[-1], 0))
    value = kept[-1]
    for index, decoder in enumerate([*p.peanut_decoders] if depth else []):
        value = np.maximum(decoder @ value, 0) + kept[depth - 1 - index]
    return p.peanut_B @ value


def weight(W, p, variant):
    assert variant.act_fn == "relu"
    change = np.stack([_network(column, p, variant.depth) for column in W.T], axis=1)
    return W + variant.scaling * change


def count(out, columns, variant):
    return 2 * out * variant.r + 2 * variant.depth * variant.r**2
