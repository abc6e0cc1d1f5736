"""BEFT in NumPy: the vector of arXiv 2509.15974, added to the bias."""


def weight(W, p, variant):
    return W


def bias(b, W, p, variant):
    return b + p.beft_bias.ravel()


def count(out, columns, variant):
    return out
