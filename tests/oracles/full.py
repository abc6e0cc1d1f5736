"""Full fine-tuning in NumPy: a weight in the place of another."""


def weight(W, p, variant):
    return p.weight


def count(out, columns, variant):
    return out * columns
