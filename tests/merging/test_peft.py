"""PEFT's add_weighted_adapter as the oracle, where it is right: LoRAs without biases, in float64."""

import contextlib
import copy
import warnings

import peft
import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests.merging.hosts import deltas, host, lora

WEIGHTS = {"a": 0.7, "b": -0.4}
SEED = 7


@contextlib.contextmanager
def wide_defaults():
    """Let PEFT make tensors of the weights in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.fixture
def peft_result(tmp_path, monkeypatch):
    """What PEFT makes of the files of adapters: site -> what its result adds to the weight."""

    def run(adapters, **options):
        # PEFT takes use_rslora, and which layers there are, from the first adapter.
        model = copy.deepcopy(host())
        for adapter in adapters:
            lorac.save_adapter(adapter, tmp_path / adapter.name, model=host())
        first, *rest = (adapter.name for adapter in adapters)
        loaded = peft.PeftModel.from_pretrained(model, tmp_path / first, adapter_name=first)
        for name in rest:
            loaded.load_adapter(tmp_path / name, adapter_name=name)
        draws, bernoulli = torch.Generator().manual_seed(SEED), torch.bernoulli
        with monkeypatch.context() as patched, wide_defaults(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patched.setattr(torch, "bernoulli", lambda p: bernoulli(p, generator=draws))
            loaded.add_weighted_adapter([first, *rest], [*WEIGHTS.values()], "merged", **options)
            layers = {
                path: layer for path, layer in loaded.base_model.model.named_modules() if hasattr(layer, "lora_A")
            }
            return {
                path: layer.get_delta_weight("merged").flatten(1)
                for path, layer in layers.items()
                if "merged" in layer.lora_A
            }

    return run


def same(found, expected):
    assert found.keys() == expected.keys()
    for path, matrix in found.items():
        assert_close(matrix, expected[path])


OF_FACTORS = {
    "linear": ("linear", {}),
    "ties": ("ties", {"density": 0.5}),
    "magnitude_prune": ("magnitude_prune", {"density": 0.5}),
    "dare_linear": ("dare_linear", {"density": 0.5}),
    "dare_ties": ("dare_ties", {"density": 0.5}),
}


@pytest.mark.parametrize("combination", OF_FACTORS)
def test_merging_factors_matches_peft(combination, peft_result):
    method, options = OF_FACTORS[combination]
    adapters = [lora("a", 1, sites=("conv", "fc1", "fc2"), r=4, alpha=3), lora("b", 2, r=4, alpha=5, rslora=True)]
    merged = lorac.merge(adapters, method, WEIGHTS, space="factors", seed=SEED, **options)
    assert merged.variant.name == "lora"
    same(deltas(merged, host()), peft_result(adapters, combination_type=combination, **options))


def test_the_majority_by_number(peft_result):
    adapters = [lora("a", 1, r=4), lora("b", 2, r=4)]
    options = {"density": 0.7, "majority_sign_method": "frequency"}
    merged = lorac.merge(adapters, "ties", WEIGHTS, space="factors", **options)
    same(deltas(merged, host()), peft_result(adapters, combination_type="ties", **options))


def test_cat(peft_result):
    adapters = [lora("a", 1, r=3, alpha=6, sites=("conv", "fc1", "fc2")), lora("b", 2, r=4, alpha=2, rslora=True)]
    merged = lorac.merge(adapters, "cat", WEIGHTS)
    assert {path: at["lora_A"].shape[0] for path, at in merged.tensors.items()} == {"conv": 3, "fc1": 7, "fc2": 7}
    same(deltas(merged, host()), peft_result(adapters, combination_type="cat"))


OF_DELTAS = {
    "svd": ("svd", {}),
    "ties_svd": ("ties", {"weighted": False, "density": 0.5}),
    "magnitude_prune_svd": ("magnitude_prune", {"density": 0.5}),
    "dare_linear_svd": ("dare_linear", {"rescale_norm": "density", "density": 0.5}),
    "dare_ties_svd": (
        "dare_ties",
        {"rescale_norm": "density", "weighted": False, "normalize": True, "density": 0.5},
    ),
}


@pytest.mark.parametrize("combination", OF_DELTAS)
def test_merging_deltas_at_a_rank_matches_peft(combination, peft_result):
    method, options = OF_DELTAS[combination]
    adapters = [lora("a", 1, r=3, alpha=6), lora("b", 2, r=4, alpha=2)]
    merged = lorac.merge(adapters, method, WEIGHTS, rank=3, seed=SEED, **options)
    assert merged.variant.name == "lora" and {at["lora_A"].shape[0] for at in merged.tensors.values()} == {3}
    given = {"density": options["density"]} if "density" in options else {}
    same(deltas(merged, host()), peft_result(adapters, combination_type=combination, svd_rank=3, **given))


@pytest.mark.parametrize(
    "variant",
    [lorac.DoRA(r=2, targets=["fc1"]), lorac.LoRA(r=2, lora_bias=True, targets=["fc1"])],
    ids=["dora", "bias"],
)
def test_where_peft_leaves_something_out(variant):
    """DoRA's magnitude and LoRA's bias, which PEFT's merge leaves at their start values, are merged."""
    model = host()
    with torch.no_grad():
        adapter = lorac.compile(model, {"a": variant}).adapters["a"]
        for tensor in adapter.parameters():
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1), dtype=tensor.dtype))
    other = lora("b", 2, r=3)
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compiled = lorac.compile(
        model, {"a": adapter, "b": other, "m": lorac.merge([adapter, other], "cat", WEIGHTS, model)}
    )
    with torch.no_grad():
        assert_close(compiled(x, adapters="m"), compiled(x, adapters=WEIGHTS))
