"""QST in NumPy: arXiv 2401.07159, one text at a time, token by token in its attention."""

import numpy as np

FIELDS = {"blocks": ("blocks.0", "blocks.1"), "heads": 2, "intermediate": 8, "r": 2, "bottleneck": 3}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def silu(z):
    return z * sigmoid(z)


def rms(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def layer_norm(x, scale, shift):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + shift


def down(h, p, n, variant):
    """(length, d/r) of (length, d)."""
    if variant.downsample in {"max", "avg"}:
        parts = h.reshape(len(h), -1, variant.r)
        return parts.max(-1) if variant.downsample == "max" else parts.mean(-1)
    n = n or (0 if variant.own_first else 1)
    if variant.downsample == "linear":
        return h @ p[f"down_{n}"].T
    low = h @ p[f"down_{n}_A"].T
    if variant.downsample == "lora":
        return low @ p[f"down_{n}_B"].T
    return layer_norm(silu(low) @ p[f"down_{n}_B"].T, p[f"down_{n}_norm_weight"], p[f"down_{n}_norm_bias"])


def turned(v, place, theta):
    """A head's vector, its features paired half with half, turned by angles that grow with its place."""
    half = len(v) // 2
    out = v.copy()
    for i in range(half):
        angle = place * theta ** (-2 * i / len(v))
        out[i] = v[i] * np.cos(angle) - v[half + i] * np.sin(angle)
        out[half + i] = v[half + i] * np.cos(angle) + v[i] * np.sin(angle)
    return out


def attention(z, w, variant, real):
    """(length, width); ``real`` says of each token whether it is no padding."""
    heads, groups = variant.heads, variant.kv_heads or variant.heads
    size = z.shape[1] // heads
    out = np.zeros_like(z)
    q, k, v = ((z @ w[key].T).reshape(len(z), -1, size) for key in "qkv")
    for head in range(heads):
        group = head // (heads // groups)
        for i in range(len(z)):
            seen = [j for j in range(len(z)) if i == j or (real[j] and (j < i or not variant.causal))]
            asks = turned(q[i, head], i, variant.rope_theta)
            scores = [asks @ turned(k[j, group], j, variant.rope_theta) / size**0.5 for j in seen]
            shares = np.exp(np.array(scores) - max(scores))
            out[i, head * size : (head + 1) * size] = (shares / shares.sum()) @ v[seen, group]
    return out @ w["o"].T


def side(u, p, n, variant, real):
    w = {key: p[f"side_{n}_{key}"] for key in ("q", "k", "v", "o", "gate", "up", "down")}
    u = u + attention(rms(u, p[f"side_{n}_input_norm"], variant.eps), w, variant, real)
    z = rms(u, p[f"side_{n}_post_norm"], variant.eps)
    return u + (silu(z @ w["gate"].T) * (z @ w["up"].T)) @ w["down"].T


def output(y, states, p, variant, real=None):
    """y' (length, d); ``states`` are h_0 to h_N, each (length, d)."""
    real = [True] * len(y) if real is None else real
    g = down(states[0], p, 0, variant)
    for n, h in enumerate(states[1:], start=1):
        beta = sigmoid(p[f"gamma_{n}"])
        g = side((1 - beta) * down(h, p, n, variant) + beta * g, p, n, variant, real)
    grown = rms(g, p["norm"], variant.eps) @ p["up_weight"].T + p["up_bias"]
    share = sigmoid(p["alpha"]) if variant.sigmoid else p["alpha"]
    return share * y + (1 - share) * grown


def branch(x, y, p, variant):
    """Every text of a batch by itself."""
    states = [p.values[name] for name in (f"in:{variant.blocks[0]}", *variant.blocks)]
    out = np.empty_like(y)
    for at in np.ndindex(y.shape[:-2]):
        out[at] = output(y[at], [h[at] for h in states], vars(p), variant)
    return out
