"""Unions: several methods in one adapter, each at sites of its own, on a model by hand."""

import pytest
import torch
from torch import nn

import lorac
from lorac.testing import assert_close
from tests.limits import assert_apart
from tests.refusing import refuses


class Mlp(nn.Module):
    """Two layers of two sizes, and a norm between."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 9)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


@pytest.fixture
def host():
    torch.manual_seed(0)
    return Mlp().eval()


X = (torch.linspace(-1, 1, 18).reshape(3, 6),)


def union(rates=(0.0, 0.0)):
    one, other = (
        lorac.LoRA(r=r, dropout=rate, targets=[name]) for r, rate, name in zip((2, 3), rates, NAMES, strict=True)
    )
    return lorac.Union(parts=(one, other))


NAMES = ("first", "second")


def compiled(host, variant, **settings):
    """With tensors away from their start."""
    found = lorac.compile(host, {"a": variant}, example_inputs=X, **settings)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for p in found.parameters() if p.requires_grad):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return found


@torch.no_grad()
def test_joins_adapters_of_different_sites(host):
    one = compiled(host, lorac.LoRA(r=2, targets=["first"])).adapters["a"]
    other = compiled(host, lorac.DoRA(r=3, targets=["second"])).adapters["a"]
    joined = lorac.Union.of(one, other, name="both")
    pair = lorac.compile(host, {"one": one, "other": other}, example_inputs=X, active={"one": 1.0, "other": 1.0})
    assert joined.name == "both"
    assert_close(lorac.compile(host, {"both": joined}, example_inputs=X)(*X), pair(*X))
    with refuses("site_unsupported", match="both target 'first'"):
        lorac.Union.of(one, one, name="twice")


@torch.no_grad()
@pytest.mark.parametrize("target", ["eager", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_each_method_acts_at_its_own_sites(host, target):
    made = compiled(host, union()).adapters["a"]
    assert {path: at["lora_A"].shape for path, at in made.tensors.items()} == {"first": (2, 6), "second": (3, 10)}
    first, second = (
        layer.weight + 8 / r * at["lora_B"] @ at["lora_A"]
        for layer, r, at in zip((host.first, host.second), (2, 3), made.tensors.values(), strict=True)
    )
    inner = torch.tanh(host.norm(nn.functional.linear(X[0], first, host.first.bias)))
    expected = nn.functional.linear(inner, second, host.second.bias)
    found = lorac.compile(host, {"a": made}, example_inputs=X, target=target)
    assert_close(found(*X), expected)
    assert_close(found(*X, adapters=None), host(*X))


@torch.no_grad()
def test_each_keeps_its_own_dropout(host):
    """A rate of 1 leaves nothing of the first, and all of the second."""
    found = compiled(host, union((1.0, 0.0)))
    made = found.adapters["a"]
    alone = lorac.Adapter("b", made.variant.parts[1], {"second": made.tensors["second"]})
    whole = found(*X)
    found.train()
    assert_close(found(*X), lorac.compile(host, {"b": alone}, example_inputs=X)(*X))
    assert_apart(found(*X), whole)


@pytest.mark.slow
@torch.no_grad()
def test_an_artifact_holds_branches_and_weights(host, tmp_path):
    variant = lorac.Union(parts=(lorac.AdapterTune(targets=["norm"]), lorac.LoRA(r=2, targets="all-linear")))
    found = compiled(host, variant)
    assert set(found.adapters["a"].sites) == {*NAMES, "norm"}
    answer = found(*X)
    found.save(tmp_path / "saved")
    again = lorac.load(tmp_path / "saved")
    assert again.adapters["a"].variant == found.adapters["a"].variant
    assert_close(again(*X), answer)


SUMS = lorac.XLoRA(hidden="norm", hidden_size=10, targets=["second"])
"""A method that computes once per call."""


def test_rejects_invalid_parts(host):
    lora = lorac.LoRA(r=2, targets=["first"])
    for parts, error, match in (
        ((lora, lorac.LoRA(targets=["first", "second"])), lorac.SiteError, "lora and lora both target 'first'"),
        ((lora, lorac.DoRA(targets=["third"])), lorac.SiteError, "'third'"),
        ((lora, lorac.LNTuning()), lorac.WrongType, "parts"),
        ((lora, SUMS), lorac.OptionError, "computes values once per call"),
        ((), lorac.OptionError, "a union needs at least one method"),
    ):
        with pytest.raises(error, match=match):
            lorac.compile(host, {"a": lorac.Union(parts=parts)}, example_inputs=X)
    with refuses("site_unsupported", match="no method of the union"):
        lorac.Union(parts=(lora,)).method_at("second")


@torch.no_grad()
def test_converts_to_a_lora_unless_it_has_a_branch(host):
    found = compiled(host, union())
    whole = lorac.to_lora(found.adapters["a"], host)
    assert_close(lorac.compile(host, {"a": whole}, example_inputs=X)(*X), found(*X))
    mixed = lorac.Union(parts=(lorac.AdapterTune(targets=["norm"]), lorac.LoRA(r=2, targets=["first"])))
    with refuses("not_mergeable", match="does not edit the weight of 'norm'"):
        lorac.to_lora(compiled(host, mixed).adapters["a"], host)
