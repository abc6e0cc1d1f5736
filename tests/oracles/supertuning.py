"""Super-Tuning in NumPy: entry by entry; Supra adds a low-rank product (arXiv 2607.09287)."""

FIELDS = {"sparsity": 0.7}


def weight(W, p, variant):
    adapted = W.copy()
    for row, column, value in zip(*p.indices, p.values, strict=True):
        adapted[row, column] += value
    if variant.r is not None:
        alpha = 2 * variant.r if variant.alpha is None else variant.alpha
        adapted += alpha / variant.r * p.lora_B @ p.lora_A
    return adapted


def count(out, columns, variant):
    return int(out * columns * (1 - variant.sparsity)) + (variant.r or 0) * (out + columns)
