"""Adapters of other methods as LoRAs: exactly where they are one, else as near as a rank allows."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import lorac
from lorac.ir.algebra.changes import merge_weight
from lorac.testing import adapter_away, assert_close, assert_parity
from tests.refusing import refuses


def made(variant):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, x = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double(), torch.randn(5, 6).double()
    return model, x, adapter_away(variant, model, x, name="a", seed=1)


@torch.no_grad()
def test_converts_low_rank_methods_exactly():
    variant = lorac.LoRA(r=2, alpha=3, lora_bias=True, rank_pattern={"0": 1}, bias="all", targets=("0", "2"))
    for method in (variant, lorac.HRA(r=2, targets=("0", "2"))):
        model, x, adapter = made(method)
        lora = lorac.to_lora(adapter, model, name="b")
        assert lora.name == "b" and lora.variant.name == "lora"
        expected = lorac.compile(model, {"a": adapter})(x)
        assert_parity(lorac.compile(model, {"b": lora})(x), expected, model(x))


@torch.no_grad()
def test_the_nearest_lora_of_a_rank():
    for method in (lorac.LoRA(r=3, targets=("0", "2")), lorac.DoRA(r=2, targets=("0", "2"))):
        model, _, adapter = made(method)
        lora = lorac.to_lora(adapter, model, rank=1)
        for path, change in lorac.factors(adapter, model).items():
            weight = model.get_submodule(path).weight
            delta, at = merge_weight(change, weight) - weight, lora.tensors[path]
            left_out = torch.linalg.svdvals(delta)[1:].square().sum()
            assert_close((delta - at["lora_B"] @ at["lora_A"]).square().sum(), left_out)


@torch.no_grad()
@pytest.mark.parametrize("method", [lorac.LoRA(r=2, targets=("0", "2")), lorac.DoRA(r=2, targets=("0", "2"))])
def test_an_adapter_of_several_models_is_that_of_each(method, tmp_path):
    models, own, joined = {}, {}, {}
    for number, name in enumerate(("unet", "text_encoder")):
        models[name], _, own[name] = made(method)
        models[name] = nn.Sequential(*models[name]).requires_grad_(False)
        models[name][0].weight.mul_(1 + number)
        joined |= {f"{name}.{path}": tensors for path, tensors in own[name].tensors.items()}
    adapter = lorac.Adapter("a", method, joined)
    factors, lora = lorac.factors(adapter, models), lorac.to_lora(adapter, models, rank=2)
    lorac.save_adapter(adapter, tmp_path / "native", format="native", model=models)
    again = lorac.factors(lorac.load_adapter(tmp_path / "native", models), models)
    for name, model in models.items():
        alone = lorac.to_lora(own[name], model, rank=2)
        for path, change in lorac.factors(own[name], model).items():
            weight = model.get_submodule(path).weight
            for found in (factors, again):
                assert_close(merge_weight(found[f"{name}.{path}"], weight), merge_weight(change, weight))
            for key, tensor in alone.tensors[path].items():
                assert_close(lora.tensors[f"{name}.{path}"][key], tensor)


def test_rejects_methods_that_are_not_low_rank():
    model, _, adapter = made(lorac.DoRA(r=2, targets=("0",)))
    with refuses("not_mergeable", match=r"change of '0' by .* scales .* weight itself.*\n.*rank= for the nearest"):
        lorac.to_lora(adapter, model)
    _, _, adapter = made(lorac.SHiRA(r=1, targets=("0",)))
    with refuses("not_mergeable", match="'0' by 'a' .* is not low-rank"):
        lorac.to_lora(adapter, model)
    _, _, adapter = made(lorac.IA3(targets=("0",)))
    with pytest.raises(lorac.BaseNeeded, match="only the base tells"):
        lorac.to_lora(adapter, rank=1)
    with pytest.raises(lorac.OptionError, match="rank 0"):
        lorac.to_lora(adapter, model, rank=0)


@torch.no_grad()
@pytest.mark.parametrize("r", [3, 5, 20])
def test_keeps_a_lora_whose_factors_are_larger_than_the_weight(r):
    """At 6 -> 9 and 9 -> 4 the factors of rank 5 are larger than the weight, and of rank 20 wider than it is.

    The rank is then the smallest that gives the same.
    """
    model, x, adapter = made(lorac.LoRA(r=r, alpha=2, targets=("0", "2")))
    for lora in (lorac.to_lora(adapter), lorac.to_lora(adapter, model)):
        assert [len(tensors["lora_A"]) for tensors in lora.tensors.values()] == [min(r, 6), min(r, 4)]
        expected = lorac.compile(model, {"a": adapter})(x)
        assert_parity(lorac.compile(model, {"b": lora})(x), expected, model(x))


@pytest.mark.medium("one method", keep=["method0"])
@torch.no_grad()
@pytest.mark.parametrize("method", [lorac.LoHa(r=2), lorac.Hydra(r=3, r_sequential=4), lorac.TeRA(r=2, order=1)])
def test_converts_factors_where_their_product_costs_less(method):
    """LoHa of rank 4, Hydra of rank 7 and TeRA of rank 2, on weights of which a product would be as large."""
    model, x, adapter = made(dataclasses.replace(method, targets=("0", "2")))
    expected = lorac.compile(model, {"a": adapter})(x)
    assert_parity(lorac.compile(model, {"b": lorac.to_lora(adapter, model)})(x), expected, model(x))


@torch.no_grad()
def test_a_tolerance_finds_the_rank_of_each_site():
    model, _, adapter = made(lorac.HiRA(r=2, targets=("0", "2")))
    lora = lorac.to_lora(adapter, model, tolerance=0.4)
    for path, change in lorac.factors(adapter, model).items():
        weight, at = model.get_submodule(path).weight, lora.tensors[path]
        delta = (merge_weight(change, weight) - weight).numpy()
        s = np.linalg.svd(delta, compute_uv=False)
        tails = [np.linalg.norm(s[k:]) / np.linalg.norm(s) for k in range(len(s) + 1)]
        assert len(at["lora_A"]) == next(k for k, share in enumerate(tails) if share <= 0.4)
        missed = np.linalg.norm(delta - (at["lora_B"] @ at["lora_A"]).numpy()) / np.linalg.norm(delta)
        assert_close(torch.tensor(lora.provenance["errors"][path], dtype=torch.float64), torch.tensor(missed))


@torch.no_grad()
def test_rejects_an_error_above_the_tolerance():
    model, _, adapter = made(lorac.HiRA(r=2, targets=("0", "2")))
    with refuses("not_mergeable", match=r"rank 1 leaves out 0\.\d+ of the change of '0' by 'a', more than"):
        lorac.to_lora(adapter, model, rank=1, tolerance=0.01)
    with pytest.raises(lorac.OptionError, match="tolerance=2 is out of range"):
        lorac.to_lora(adapter, model, tolerance=2)


@torch.no_grad()
def test_converts_an_edit_without_the_model():
    model, x, adapter = made(lorac.Edit(targets=("0", "2")))
    lora = lorac.to_lora(adapter, tolerance=1e-12)
    expected = lorac.compile(model, {"a": adapter})(x)
    assert_parity(lorac.compile(model, {"b": lora})(x), expected, model(x))


@torch.no_grad()
def test_stores_errors_in_the_provenance(tmp_path):
    model, _, adapter = made(lorac.LoRA(r=3, targets=("0", "2")))
    lora = lorac.to_lora(adapter, model, rank=2)
    lorac.save_adapter(lora, tmp_path / "file", format="native")
    assert lorac.load_adapter(tmp_path / "file").provenance["errors"] == lora.provenance["errors"]
    assert all(0 < error < 1 for error in lora.provenance["errors"].values())
