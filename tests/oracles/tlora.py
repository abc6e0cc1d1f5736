"""TLoRA in NumPy: Tao et al. 2025, equations 5 and 7, entry by entry, with the scale of the authors' code."""

import functools
import itertools
import math

import numpy as np


def _cores(p, prefix):
    found = []
    while hasattr(p, f"{prefix}_{len(found)}"):
        found.append(getattr(p, f"{prefix}_{len(found)}"))
    return found


def indices(sizes, order):
    """Every multi-index, in the order of the flat index."""
    if order == "big":
        return list(itertools.product(*(range(n) for n in sizes)))
    return [tuple(reversed(one)) for one in itertools.product(*(range(n) for n in reversed(sizes)))]


def _trace(cores, at):
    """tr(G¹[at₁] ⋯ Gᴰ[at_D])."""
    return np.trace(functools.reduce(np.matmul, [core[i] for core, i in zip(cores, at, strict=True)]))


def transform(p, variant, columns):
    cores = [c.reshape(*c.shape[:2], 1, 1) if c.ndim == 2 else c for c in _cores(p, "transform_core")]
    if not cores:
        return np.eye(columns)
    every = indices([len(core) for core in cores], variant.index_order)
    return np.array([[_trace(cores, list(zip(js, ks, strict=True))) for ks in every] for js in every])


def residual(p, variant):
    if variant.residual == "lora":
        return p.lora_B @ p.lora_A
    cores = _cores(p, "ttv_core")
    left, right = cores[: len(cores) // 2], cores[len(cores) // 2 :]
    rows, columns = (indices([len(core) for core in part], variant.index_order) for part in (left, right))
    return np.array([[_trace(cores, (*a, *j)) for j in columns] for a in rows])


def weight(W, p, variant):
    s = variant.alpha / (math.sqrt(variant.r) if variant.rslora else variant.r)
    return W @ transform(p, variant, W.shape[1]) + s * residual(p, variant)


# The hosts' sizes and their most balanced factors.
_FACTORS = {6: (1, 2, 3), 7: (1, 1, 7), 8: (2, 2, 2), 9: (1, 3, 3), 11: (1, 1, 11), 12: (2, 2, 3)}


def count(out, columns, variant):
    turned = variant.transform_rank**2 * sum(n * n for n in _FACTORS[columns])
    if variant.residual == "lora":
        return turned + variant.r * (out + columns)
    return turned + variant.r**2 * (sum(_FACTORS[out]) + sum(_FACTORS[columns]))
