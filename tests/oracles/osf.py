"""OSF in NumPy: the trained terms of an SVD in the place of those that they started as (arXiv 2504.07097)."""


def weight(W, p, variant):
    adapted = W.copy()
    for index in range(len(p.S_low)):
        adapted += p.S_low[index] * p.U_low[:, index, None] * p.V_low[None, index]
        adapted -= p.S_init[index] * p.U_init[:, index, None] * p.V_init[None, index]
    return adapted


def count(out, columns, variant):
    side, rank = min(out, columns), variant.effective_rank
    share = rank is None or (isinstance(rank, float) and rank <= 1)
    low = side - (int(side * (0.5 if rank is None else rank)) if share else min(side, rank))
    return low * (out + columns + 1)
