"""SHiRA in NumPy: Bhardwaj et al. 2024, section 3.1, entry by entry."""


def weight(W, p, variant):
    adapted = W.copy()
    rows, columns = p.indices
    for row, column, value in zip(rows, columns, p.values, strict=True):
        adapted[row, column] += value
    return adapted


def count(out, columns, variant):
    return variant.r * (out + columns)
