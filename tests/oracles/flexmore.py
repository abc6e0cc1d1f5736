"""FlexMoRE in NumPy, from arXiv 2602.08818: every expert merged, each token sent to the k of the largest shares."""

import numpy as np

FIELDS = {"ranks": (2, 1)}


def silu(z):
    return z / (1 + np.exp(-z))


def shares(logits, k, normalise):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1, kind="stable")[..., :k]
    kept = np.zeros_like(p)
    np.put_along_axis(kept, order, np.take_along_axis(p, order, -1), -1)
    return kept / kept.sum(-1, keepdims=True) if normalise else kept


def expert(x, g, u, d):
    return (silu(x @ g.T) * (x @ u.T)) @ d.T


def matrices(base, p, number, rank):
    names = [f"{part}_{number}" for part in ("gate", "up", "down")]
    if not rank:
        return [getattr(p, name) for name in names]
    return [w + getattr(p, f"{n}_B") @ getattr(p, f"{n}_A") for w, n in zip(base, names, strict=True)]


def mlp(x, base, p, variant):
    """y' of x (…, d); ``base`` the model's own G, U and D."""
    weights = shares(x @ p.router.T, variant.top_k, variant.normalise)
    experts = [list(base), *(matrices(base, p, n, rank) for n, rank in enumerate(variant.ranks, 1))]
    return sum(weights[..., e : e + 1] * expert(x, *parts) for e, parts in enumerate(experts))


def erank(values):
    """Effective rank: ⌈exp(H(σ/Σσ))⌉."""
    share = np.asarray(values) / np.sum(values)
    return int(np.ceil(np.exp(-(share * np.log(share)).sum()) - 1e-12))


def branch(x, y, p, variant):
    """Of the model's own matrices only what they give is known: G·x and U·x, and D."""
    gate, up, down = (
        next(p.values[name] for name in p.values if name.endswith(end)) for end in (".gate", ".up", ".down")
    )
    weights = shares(x @ p.router.T, variant.top_k, variant.normalise)
    out = weights[..., :1] * y
    for n, rank in enumerate(variant.ranks, 1):
        names = [f"{part}_{n}" for part in ("gate", "up", "down")]
        if rank:
            g, u, d = (getattr(p, f"{name}_B") @ getattr(p, f"{name}_A") for name in names)
            one = (silu(gate + x @ g.T) * (up + x @ u.T)) @ (down + d).T
        else:
            one = expert(x, *(getattr(p, name) for name in names))
        out = out + weights[..., n : n + 1] * one
    return out
