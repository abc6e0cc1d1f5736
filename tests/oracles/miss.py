"""MiSS in NumPy: Kang 2024, later versions; entry by entry, input k of every shard meets row k of D."""

FIELDS = {"mini_r": 2}


def weight(W, p, variant):
    adapted = W.copy()
    block, r = p.miss_block, variant.r
    for o in range(W.shape[0]):
        column = o % variant.mini_r if variant.mini else o
        for i in range(W.shape[1]):
            adapted[o, i] += block[i % r, column]
    return adapted


def count(out, columns, variant):
    return variant.r * (variant.mini_r if variant.mini else out)
