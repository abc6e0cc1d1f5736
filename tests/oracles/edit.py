"""An edit in NumPy, entry by entry."""

import numpy as np


def weight(W, p, variant):
    out, columns = W.shape
    has = vars(p).get
    transform = np.zeros((columns, columns))
    blocks = has("t", np.ones((columns, 1, 1)))
    size = blocks.shape[-1]
    for n, block in enumerate(blocks):
        transform[n * size : (n + 1) * size, n * size : (n + 1) * size] = block
    c, d = has("c", np.ones(out)), has("d", np.ones(columns))
    made = c[:, None] * (W @ transform.T) * d
    if has("a") is not None:
        made = made + np.einsum("ir,ro->oi", p.a, p.b)
    for row, column, value in zip(*has("indices", ((), ())), has("values", ()), strict=True):
        made[row, column] += value
    return made + has("delta", 0.0)


def bias(b, W, p, variant):
    return b + vars(p).get("e", 0.0)


def count(out, columns, variant):
    n = variant.parts
    sizes = {"pair": n.get("pair", 0) * (out + columns), "c": out, "d": columns, "e": out, "delta": out * columns}
    sizes |= {"sparse": n.get("sparse", 0), "t": n.get("t", 0) * columns}
    return sum(sizes[part] for part in n)
