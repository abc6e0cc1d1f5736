"""Bottleneck adapters in NumPy, from the equations of arXiv 1902.00751, 2005.00247, 2110.04366 and 2106.04647.

h is what a sublayer gives, r its residual; a post-LN model answers LN(h + r), a pre-LN model h + r.
"""

import math

import numpy as np

FIELDS = {
    "reduction_factor": 2.0,
    "scaling": 0.7,
    **dict.fromkeys(("mh_adapter", "output_adapter", "original_ln_after", "residual_before_ln"), True),
    **dict.fromkeys(("cross_adapter", "is_parallel", "original_ln_before", "ln_before", "ln_after"), False),
    **dict.fromkeys(("adapter_residual_before_ln", "use_gating", "phm_layer"), False),
    **dict.fromkeys(("phm_bias", "factorized_phm_W", "shared_phm_rule", "learn_phm"), True),
    **dict.fromkeys(("shared_W_phm", "factorized_phm_rule"), False),
}
"""Without a residual most placements are one: each is compared on models that have some (tests/variants)."""
_erf = np.vectorize(math.erf)
ACTS = {
    "swish": lambda z: z / (1 + np.exp(-z)),
    "relu": lambda z: np.maximum(z, 0),
    "gelu": lambda z: z * 0.5 * (1 + _erf(z / math.sqrt(2))),
}


def norm(z, weight, bias, eps=1e-5):
    centred = z - z.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def matrix(p, name, variant):
    """(in, out): a plain weight transposed, or the sum of Kronecker products."""
    if not variant.phm_layer:
        return getattr(p, name).T
    rule = p.phm_rule if variant.shared_phm_rule else getattr(p, f"{name}_phm_rule")
    left, right = getattr(p, f"{name}_W_left"), getattr(p, f"{name}_W_right")
    return sum(np.kron(rule[i], left[i] @ right[i]) for i in range(len(rule)))


def bottleneck(z, p, variant):
    """s·(U·act(D·z + p) + q), gated."""
    inner = norm(z, p.norm_before, p.norm_before_bias) if variant.ln_before else z
    hidden = ACTS[variant.non_linearity](inner @ matrix(p, "down", variant) + p.down_bias)
    scale = p.scaling if isinstance(variant.scaling, str) else variant.scaling
    up = scale * (hidden @ matrix(p, "up", variant) + p.up_bias)
    if variant.use_gating:
        up = up * (1 / (1 + np.exp(-(z @ p.gate.T + p.gate_bias)))).mean(-2, keepdims=True)
    return up


def stream(h, r, p, variant, ln=None):
    """What follows a sublayer with its adapter; ``ln`` is the model's own norm behind the sum, if it has one."""
    ln = ln or (lambda value: value)
    after = (lambda value: norm(value, p.norm_after, p.norm_after_bias)) if variant.ln_after else (lambda value: value)
    if variant.is_parallel:
        u = h + after(bottleneck(r, p, variant))
    else:
        z = ln(h + r) if variant.original_ln_before else h
        residual = {True: h, False: z, "post_add": h + r}[variant.residual_before_ln]
        inside = variant.adapter_residual_before_ln
        u = after(bottleneck(z, p, variant) + residual * inside) + residual * (not inside)
    return ln(u + r) if variant.original_ln_after else u


def branch(x, h, p, variant):
    return h + bottleneck(h, p, variant)


def count(out, columns, variant):
    beta = max(1, int(out // variant.reduction_factor))
    return 2 * out * beta + beta + out


def coupled(x, p, act):
    """NICE: y1 = x1 + F(x2), y2 = x2 + G(y1)."""
    half = x.shape[-1] // 2
    one, two = x[..., :half], x[..., half:]
    first = one + _net(two, p, "F", act)
    return np.concatenate([first, two + _net(first, p, "G", act)], -1)


def _net(z, p, name, act):
    down, up = (getattr(p, f"{name}_{half}") for half in ("down", "up"))
    return act(z @ down.T + getattr(p, f"{name}_down_bias")) @ up.T + getattr(p, f"{name}_up_bias")
