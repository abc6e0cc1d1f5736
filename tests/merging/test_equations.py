"""The ways against their equations in NumPy, written on vectors from the papers and mergekit's documentation."""

import numpy as np
import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests.merging.hosts import deltas, host, lora

WEIGHTS = np.array([0.7, 0.4, 0.2])


def unit(v):
    return v / np.linalg.norm(v)


def along(point, tangent):
    """The point that a geodesic of the unit sphere reaches."""
    length = np.linalg.norm(tangent)
    return np.cos(length) * point + np.sin(length) / length * tangent


def slerp(v, w):
    t = w[1] / (w[0] + w[1])
    angle = np.arccos(unit(v[0]) @ unit(v[1]))
    return (np.sin((1 - t) * angle) * v[0] + np.sin(t * angle) * v[1]) / np.sin(angle)


def multislerp(v, w):
    w = w / w.sum()
    directions = np.array([unit(one) for one in v])
    mean = unit(w @ directions)
    tangents = directions - np.outer(directions @ mean, mean)
    return along(mean, w @ tangents) * (w @ np.linalg.norm(v, axis=1))


def karcher(v, w):
    w = w / w.sum()
    directions = np.array([unit(one) for one in v])
    point = unit(w @ directions)
    for _ in range(3):
        angles = np.arccos(directions @ point)
        logs = (angles / np.sin(angles))[:, None] * (directions - np.outer(np.cos(angles), point))
        point = unit(along(point, w @ logs))
    return point * (w @ np.linalg.norm(v, axis=1))


def model_stock(v, w):
    count = len(v)
    cosine = np.mean([unit(v[i]) @ unit(v[j]) for i in range(count) for j in range(i)])
    share = count * cosine / (1 + (count - 1) * cosine)
    return share * (w[:, None] * v).mean(0)


def sce(v, w):
    v = w[:, None] * v
    kept = np.argsort(-v.var(0))[: int(0.3 * v.shape[1])]
    selected = np.zeros_like(v)
    selected[:, kept] = v[:, kept]
    shares = (selected**2).mean(1)[:, None]
    agree = np.sign(selected) == np.where(selected.sum(0) >= 0, 1, -1)
    divisor = (shares * agree).sum(0)
    return (shares * selected * agree).sum(0) / np.where(divisor == 0, 1, divisor)


def breadcrumbs(v, w):
    pruned = np.zeros_like(v)
    for one, made in zip(v, pruned, strict=True):
        order = np.argsort(-np.abs(one))
        outliers = int(0.05 * one.size)
        kept = order[outliers : outliers + int(0.5 * one.size)]
        made[kept] = one[kept]
    return w @ pruned


OF_TWO = {"slerp": (slerp, {})}
OF_THREE = {
    "multislerp": (multislerp, {}),
    "karcher": (karcher, {"max_iter": 3, "tol": 1e-300}),
    "model_stock": (model_stock, {}),
    "sce": (sce, {"select_topk": 0.3}),
    "breadcrumbs": (breadcrumbs, {"density": 0.5, "gamma": 0.05}),
}


@pytest.mark.parametrize("method", [*OF_TWO, *OF_THREE])
def test_equations(method):
    equation, options = {**OF_TWO, **OF_THREE}[method]
    adapters = [lora(name, seed, r=3, alpha=2 + seed) for seed, name in enumerate("abc")][
        : 2 if method in OF_TWO else 3
    ]
    weights = WEIGHTS[: len(adapters)]
    merged = deltas(lorac.merge(adapters, method, weights.tolist(), **options), host())
    each = [deltas(one, host()) for one in adapters]
    for path, matrix in merged.items():
        vectors = np.stack([one[path].numpy().ravel() for one in each])
        assert_close(matrix, torch.from_numpy(equation(vectors, weights).reshape(matrix.shape)))


def test_della_keeps_larger_entries_of_a_row_likelier(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "bernoulli", lambda p, generator: asked.append(p) or torch.ones_like(p))
    one = lorac.Adapter(
        "a", lorac.Edit(targets=("fc",)), {"fc": {"delta": torch.tensor([[3.0, -1, 2], [0.5, 0.25, -1]])}}
    )
    lorac.merge([one], "della", density=0.5, epsilon=0.25)
    [probabilities] = asked
    assert torch.equal(probabilities, torch.tensor([[0.75, 0.25, 0.5], [0.5, 0.25, 0.75]]))
