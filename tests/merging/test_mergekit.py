"""mergekit on dense weights as the oracle; it is not installed with the tests' packages, since its licence is LGPL.

pip install --target FOLDER --no-deps mergekit immutables, and FOLDER on PYTHONPATH
"""

import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests.merging.hosts import deltas, host, lora, weight_at

registry = pytest.importorskip(
    "mergekit.merge_methods.registry", reason="mergekit is not installed: pip install --no-deps mergekit immutables"
)
base = pytest.importorskip("mergekit.merge_methods.base")
SEED = 7
NAMES = ("a", "b", "c")
WEIGHTS = (0.7, 0.4, -0.3)
DENSITY = (0.5, 0.3, 0.8)
PRUNED = {"weight": WEIGHTS, "density": DENSITY}
CASES = {
    "task_arithmetic": [{"weight": WEIGHTS}, {"weight": WEIGHTS, "lambda": 0.5}],
    "linear": [{"weight": WEIGHTS}, {"weight": WEIGHTS, "normalize": False}],
    "ties": [PRUNED, {**PRUNED, "normalize": False}, {**PRUNED, "rescale": True}, {"weight": WEIGHTS}],
    "dare_linear": [PRUNED, {**PRUNED, "rescale": False}, {**PRUNED, "normalize": True}],
    "dare_ties": [PRUNED, {**PRUNED, "normalize": True}],
    "della": [{**PRUNED, "epsilon": (0.1, 0.2, 0.15)}],
    "della_linear": [PRUNED],
    "breadcrumbs": [PRUNED, {**PRUNED, "gamma": (0.05, 0.9, 0.01)}],
    "breadcrumbs_ties": [PRUNED],
    "sce": [{}, {"select_topk": 0.3}],
    "slerp": [{"t": 0.3}, {"t": 0.0}],
    "multislerp": [{"weight": (0.7, 0.4, 0.3)}, {"weight": (0.5, 0.5, 0.5), "normalize_weights": False}],
    "karcher": [{}, {"max_iter": 2}],
    "model_stock": [{}],
}
OF_MERGEKIT = {"lambda": "scale"}
"""Options of mergekit by lorac's other names for them."""
EXACT = {"multislerp": {"eps": 0.0}}
"""What mergekit adds to lengths, which it would else not divide by."""
IN_FLOAT32 = {"dare_linear", "dare_ties", "della", "della_linear"}
"""Methods whose random pruning mergekit computes in float32."""


@pytest.mark.parametrize(("method", "options"), [(name, one) for name, many in CASES.items() for one in many])
def test_on_dense_weights(method, options, monkeypatch):
    model = host()
    adapters = [lora(name, seed, r=3, alpha=2 + seed) for seed, name in enumerate(NAMES)][
        : 2 if method == "slerp" else 3
    ]
    weights = dict(zip(NAMES, options["weight"], strict=True)) if "weight" in options else None
    own = {OF_MERGEKIT.get(key, key): value for key, value in options.items() if key != "weight"}
    merged = deltas(lorac.merge(adapters, method, weights, model, seed=SEED, **own), model)
    bernoulli, draws = torch.bernoulli, torch.Generator().manual_seed(SEED)
    monkeypatch.setattr(torch, "bernoulli", lambda p, **_: bernoulli(p.double(), generator=draws).to(p.dtype))
    each = [deltas(adapter, model) for adapter in adapters]
    for path in sorted(merged):
        expected = in_mergekit(method, weight_at(model, path), [one[path] for one in each], options)
        dtype = torch.float32 if method in IN_FLOAT32 else torch.float64
        assert_close(merged[path].to(dtype), expected.to(dtype))


def in_mergekit(method, weight, changes, options):
    """What mergekit adds to a weight; slerp and karcher get the changes in place of whole weights."""
    whole = method in {"slerp", "karcher"}
    tensors = changes if whole else [weight + change for change in changes]
    based = method not in {"linear", "karcher"}
    tensors = [weight, *tensors] if based and not whole else tensors
    group = base.TensorGroup.from_tensors(tensors, base_index=0 if based else None)
    given = {**options, **EXACT.get(method, {})}
    [result] = registry.get(method)([group], parameters=given, dtype=torch.float64)
    total = 0.0 if whole else 1.0 if options.get("normalize", True) or based else sum(options["weight"])
    return result - total * weight
