"""Adaption prompts in NumPy: one attention over the prompt, token by token and head by head (arXiv 2303.16199)."""

import numpy as np


def turn(vector, cos, sin):
    """Turn a head's vector, whose first half is paired with its second."""
    half = len(vector) // 2
    first, second = vector[:half], vector[half:]
    return np.concatenate(
        [first * cos[:half] - second * sin[:half], second * cos[half:] + first * sin[half:]],
    )


def attend(queries, prompt, gate, key, value, heads, cos=None, sin=None):
    """Return g·softmax(q·Kᵀ/√s)·V of every token (length, heads·s), its heads one behind the other.

    Args:
        queries: (length, heads·s).
        prompt: P (n, d).
        key, value: the pairs (W, b) of the projections.
        cos, sin: of each token's position (length, s); None for queries without positions.
    """
    keys, values = (prompt @ weight.T + bias for weight, bias in (key, value))
    size = queries.shape[1] // heads
    group = heads * size // keys.shape[1]
    out = np.zeros_like(queries)
    for token, whole in enumerate(queries):
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // group * size, (head // group + 1) * size)
            q = whole[own] if cos is None else turn(whole[own], cos[token], sin[token])
            shares = np.exp([q @ k / np.sqrt(size) for k in keys[:, shared]])
            out[token, own] = gate * (shares / shares.sum()) @ values[:, shared]
    return out
