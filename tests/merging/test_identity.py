"""One adapter at weight 1 is the identity: every way, every method."""

import contextlib
import dataclasses
import functools
import importlib
from pathlib import Path

import pytest
import torch

import lorac
from lorac import SiteError, WeightVariant
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.changes import merge_bias, merge_weight
from lorac.merging import ways
from lorac.merging.merge import merge_sites
from lorac.merging.registry import make_way
from lorac.merging.way import SiteWay
from lorac.testing import assert_close, samples
from tests.merging.hosts import host, lora
from tests.refusing import refuses

ORACLES = Path(__file__).parents[1] / "oracles"
SITES = ("fc1", "fc2")
WITHOUT_DEFAULT = {
    "chain": {"parts": (lorac.LoRA(), lorac.DoRA())},
    "residual": {"method": lorac.LoRA()},
    "decor_weight": {"r": 3},
}
OF_FACTORS = {"lego", "svd"}
"""Ways that read factors, which not every change has."""
METHODS = {
    name: method
    for name, method in lorac.variants().items()
    if method.__module__.startswith("lorac.variants.") and issubclass(method, WeightVariant)
    if (ORACLES / f"{name}.py").exists()  # the others replace rows, or parts of packed layers
}


@functools.cache
def model():
    return host()


@functools.cache
def adapter(name):
    """An adapter of a method, every tensor drawn."""
    method = METHODS[name]
    fields = getattr(importlib.import_module(f"tests.oracles.{name}"), "FIELDS", {})
    for targets in (SITES, ("conv",)):
        variant = samples(method, **{**fields, **WITHOUT_DEFAULT.get(name, {}), "targets": targets})[0]
        with contextlib.suppress(SiteError):
            compiled = lorac.compile(model(), {name: variant})
            break
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in filter(torch.is_floating_point, compiled.adapters[name].parameters()):
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return compiled.adapters[name]


@pytest.mark.medium("methods of each normal form", keep=["lora", "dora", "ia3", "shira", "oft", "chain"])
@pytest.mark.parametrize("name", METHODS)
def test_keeps_a_single_adapter_at_weight_1(name):
    one = adapter(name)
    for method in ways():
        merged = lorac.merge({"one": one}, method, model=model(), name="merged")
        assert merged.name == "merged" and merged.variant == one.variant
        assert merged.tensors.keys() == one.tensors.keys()
        for path, tensors in one.tensors.items():
            assert all(torch.equal(merged.tensors[path][key], tensor) for key, tensor in tensors.items())


def test_keeps_a_single_router():
    router = lorac.MeteoRA.from_loras([lora("a", 1, r=2), lora("b", 2, r=2)])
    for method in ways():
        assert lorac.merge([router], method).tensors is router.tensors
    with refuses("not_mergeable"):
        lorac.merge([router, lora("a", 1, r=2)], "cat", model=model())


@pytest.mark.medium("methods of three normal forms", keep=["lora", "dora", "oft"])
@pytest.mark.slow(
    "a method of each normal form",
    keep=["lora", "dora", "ia3", "oft", "shira", "bat", "chain", "tlora", "vera", "edit"],
)
@torch.no_grad()
@pytest.mark.parametrize("name", METHODS)
def test_every_formula_keeps_a_single_adapter(name):
    """The same by the ways themselves, where each site's change goes through their formulas."""
    one, view = adapter(name), ModelView.of(model())
    expected = lorac.factors(one, model())
    for method, way in ways().items():
        if not issubclass(way, SiteWay) or method in OF_FACTORS:
            continue
        merged = lorac.factors(merge_sites(make_way(method, {}, ["one"]), [one], [1.0], "merged", view), model())
        for path, change in expected.items():
            site = view.sites[path]
            weight, bias = view.base.weight(site), view.base.bias(site)
            assert_close(merge_weight(merged[path], weight), merge_weight(change, weight))
            if bias is not None:
                assert_close(merge_bias(merged[path], bias), merge_bias(change, bias))


@torch.no_grad()
@pytest.mark.parametrize("space", ["factors", "knots", "core"])
def test_the_spaces_of_factors(space):
    one, view = lora("one", 1, r=3, alpha=5), ModelView.of(model())
    for method in ("ties", "dare_ties", "task_arithmetic", "sce"):
        way = make_way(method, {"space": space}, ["one"])
        merged = merge_sites(way, [one], [1.0], "merged", view)
        for path, change in lorac.factors(one, model()).items():
            weight = view.base.weight(view.sites[path])
            assert_close(merge_weight(lorac.factors(merged)[path], weight), merge_weight(change, weight))


def test_an_option_that_leaves_entries_out_does_so():
    one = lora("one", 1, r=3)
    thinned = lorac.merge([one], "magnitude_prune", density=0.25)
    [delta] = {float((at["delta"] != 0).double().mean()) for at in thinned.tensors.values()}
    assert delta == 0.25


@pytest.mark.parametrize("method", sorted(OF_FACTORS))
def test_rejects_dora_where_factors_are_merged(method):
    with refuses("not_mergeable", match="DoRA|dora"):
        lorac.merge([adapter("dora"), dataclasses.replace(adapter("lora"))], method, model=model())
