"""X-LoRA in NumPy: arXiv 2402.07148 and PEFT's XLORA, token by token and expert by expert."""

import numpy as np

FIELDS = {"hidden": "site", "hidden_size": 11, "experts": 2, "depth": 2, "size": 5}


def softmax(z):
    exponentials = np.exp(z - z.max())
    return exponentials / exponentials.sum()


def scalings(logits, variant):
    """What one token's experts weigh, of what the classifier gives (experts,)."""
    return left_of(softmax(logits / variant.softmax_temperature) if variant.enable_softmax else logits.copy(), variant)


def left_of(weights, variant):
    """What top-k and a softmax behind it leave of one token's weights."""
    if variant.top_k_lora is not None:
        kept = sorted(range(len(weights)), key=lambda i: -weights[i])[: variant.top_k_lora]
        weights = np.array([w if i in kept else 0.0 for i, w in enumerate(weights)])
    left = weights != 0
    if variant.enable_softmax_topk and left.any():
        weights[left] = softmax(weights[left])
    return weights


def classified(h, layers):
    """What the classifier gives of one token's hidden state; layers are pairs of weight and bias."""
    for j, (weight, bias) in enumerate(layers):
        h = weight @ (np.maximum(h, 0) if j else h) + bias
    return h


def site(x, y, a, b, weights, variant):
    """y' of one token."""
    for i, w in enumerate(weights):
        rows = slice(i * variant.r, (i + 1) * variant.r)
        scale = variant.scales[i] if variant.scales else 1
        y = y + variant.global_scaling_weight * scale * w * (b[:, rows] @ (a[rows] @ x))
    return y


def once(p, variant):
    """What every token's experts weigh at each of the layers, of the base's last hidden state."""
    layers = [(getattr(p, f"classifier_{j}_weight"), getattr(p, f"classifier_{j}_bias")) for j in range(variant.depth)]
    if not variant.activation:  # two linear maps after one another
        layers = [(layers[1][0] @ layers[0][0], layers[1][0] @ layers[0][1] + layers[1][1])]
    h = p.values[f"pass:scaling:{variant.hidden}" if variant.scaling_pass_value else f"base:{variant.hidden}"]
    given = (classified(token, layers).reshape(-1, variant.experts) for token in h.reshape(-1, h.shape[-1]))
    found = [[scalings(logits, variant) for logits in of_token] for of_token in given]
    return {"scalings": np.array(found).reshape(*h.shape[:-1], -1, variant.experts)}


def branch(x, y, p, variant):
    constant = left_of(np.full(variant.experts, float(variant.scaling_pass_value)), variant)
    place = variant.targets.index(p.site) if variant.layerwise_scalings else 0
    out = np.empty_like(y)
    for at in np.ndindex(y.shape[:-1]):
        weights = constant if p.passing else p.values["own:scalings"][at][place]
        out[at] = site(x[at], y[at], p.lora_A, p.lora_B, weights, variant)
    return out
