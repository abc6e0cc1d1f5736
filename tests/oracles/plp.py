"""Break-for-Make's partly learnable projections in NumPy, block by block: [[A C, A D], [E C, E D]]."""


def weight(W, p, variant):
    adapted = W.copy()
    top, left = len(p.up_frozen), p.down_frozen.shape[1]
    square = W.shape[0] == W.shape[1]
    if not (variant.identity_init and variant.basis == "rows" and square):
        adapted[:top, :left] += p.up_frozen @ p.down_frozen
    adapted[:top, left:] += p.up_frozen @ p.down_learned
    adapted[top:, :left] += p.up_learned @ p.down_frozen
    adapted[top:, left:] += p.up_learned @ p.down_learned
    return adapted


def count(out, columns, variant):
    return variant.r * (out - out // 2) + variant.r * (columns - columns // 2)
