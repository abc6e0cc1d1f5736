"""Ways that put whole adapters together: Arrow against PEFT, learned weights, Break-for-Make's halves."""

import pytest
import torch
from peft import ArrowConfig
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import nn

import lorac
from lorac.testing import assert_close
from tests.merging.hosts import LAYERS, deltas, host, lora
from tests.refusing import refuses

LORAS = ("a", "b", "c")


def loras():
    return [lora(name, seed, r=3, alpha=2 + seed) for seed, name in enumerate(LORAS)]


def layer_of(adapters, path, top_k, temperature):
    """PEFT's layer, and what its forward takes besides x."""
    columns = LAYERS[path][1]
    config = ArrowConfig(top_k=top_k, router_temperature=temperature)
    config.task_adapter_names, config.gks_adapter_names = [*LORAS], []
    a, b = {}, {}
    for one in adapters:
        down, up = one.tensors[path]["lora_A"], one.tensors[path]["lora_B"]
        a[one.name], b[one.name] = nn.Linear(columns, len(down), bias=False), nn.Linear(len(down), len(up), bias=False)
        a[one.name].weight, b[one.name].weight = nn.Parameter(down), nn.Parameter(up)
    scaling = {one.name: one.variant.scale for one in adapters}
    return ArrowLoraLinearLayer(columns, config), a, b, scaling


@torch.no_grad()
@pytest.mark.parametrize(("top_k", "temperature"), [(1, 1.0), (2, 0.5), (3, 2.0)])
def test_arrow_is_pefts(top_k, temperature):
    model, adapters = host(), loras()
    merged = lorac.merge(adapters, "arrow", top_k=top_k, temperature=temperature)
    x = torch.randn(5, 4, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    layer, a, b, scaling = layer_of(adapters, "fc1", top_k, temperature)
    layer.prototypes = merged.tensors["fc1"]["prototypes"]
    expected = layer(x, a, b, nn.Identity(), scaling)
    alone = lorac.Adapter("m", merged.variant, {"0": merged.tensors["fc1"]})
    assert_close(lorac.compile(nn.Sequential(model.fc1), {"m": alone})(x) - model.fc1(x), expected)


@torch.no_grad()
def test_arrows_prototypes_match_pefts():
    adapters = loras()
    for one in adapters:
        one.tensors["fc1"]["lora_B"] *= torch.tensor([20.0, 1.0, 1.0])
    layer, a, b, _ = layer_of(adapters, "fc1", 2, 1.0)
    found = lorac.merge(adapters, "arrow").tensors["fc1"]["prototypes"]
    for prototype, name in zip(found, LORAS, strict=True):
        vector = layer.top_right_singular_vec_from_BA(a[name].weight, b[name].weight, iters=200)
        assert_close(prototype.float() * (vector @ prototype.float()).sign(), vector)


@torch.no_grad()
def test_learned_weights_begin_as_the_weighted_sum():
    adapters, weights = loras(), [0.5, -1.0, 2.0]
    merged = lorac.merge(adapters, "learned_cat", weights)
    assert merged.variant.name == "learned_cat" and merged.tensors["fc1"]["weights"].tolist() == weights
    expected = deltas(lorac.merge(adapters, "cat", weights), host())
    for path, delta in deltas(merged, host()).items():
        assert_close(delta, expected[path])


def test_learned_weights_alone_are_trained():
    compiled = lorac.compile(host(), {"soup": lorac.merge(loras(), "learned_cat")})
    assert [tuple(p.shape) for p in compiled.parameters() if p.requires_grad] == [(3,), (3,)]


def test_converts_other_low_rank_methods_to_loras():
    model = host()
    with torch.no_grad():
        made = lorac.compile(model, {"m": lorac.MiSS(r=4, targets=["fc1"]), "d": lorac.DoRA(r=2, targets=["fc1"])})
        miss, dora = made.adapters["m"], made.adapters["d"]
    merged = lorac.merge([lora("a", 1, r=3), miss], "arrow", model=model)
    assert merged.variant.experts == 2
    with refuses("not_mergeable", match="rank="):
        lorac.merge([lora("a", 1, r=3), dora], "arrow", model=model)
    assert lorac.merge([lora("a", 1, r=3), dora], "arrow", model=model, rank=2).variant.r == 2


def test_halves_are_joined_as_they_are():
    model = host()
    halves = lorac.compile(model, {name: lorac.PLP(r=2, targets=["fc1"]) for name in ("content", "style")}).adapters
    content, style = halves["content"], halves["style"]
    merged = lorac.merge([content, style], "break_for_make")
    assert merged.variant == style.variant
    assert torch.equal(merged.tensors["fc1"]["down_learned"], content.tensors["fc1"]["down_learned"])
    assert torch.equal(merged.tensors["fc1"]["up_learned"], style.tensors["fc1"]["up_learned"])
    with refuses("choice_error", match="weights"):
        lorac.merge([content, style], "break_for_make", [1.0, 0.5])
    with refuses("choice_error", match="takes 2 adapters"):
        lorac.merge([content, style, lora("a", 1, r=2)], "break_for_make")
