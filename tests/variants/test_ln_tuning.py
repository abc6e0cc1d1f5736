"""LN tuning: the copied modules, the trained ones, and swaps that restore the base's."""

import dataclasses

import pytest
import torch

import lorac
from lorac import LNTuning
from lorac.testing import assert_close
from tests import parity
from tests.refusing import refuses
from tests.zoo import ZOO


@pytest.mark.parametrize(
    ("path", "copied"),
    [
        ("model.layers.0.input_layernorm", True),
        ("model.norm", True),
        ("bert.encoder.layer.0.output.LayerNorm", True),
        ("transformer.h.0.ln_1", True),
        ("model.layers.0.mlp.down_proj", False),
        ("model.layers.0", False),
    ],
)
def test_default_targets(path, copied):
    assert LNTuning().replaces_module(path) is copied
    assert not LNTuning(exclude=(path,)).replaces_module(path)


@torch.no_grad()
def moved(compiled, by):
    """Every replaced tensor moved, each by noise of its own; a detached copy of the adapter."""
    adapter = compiled.adapters["a"]
    generator = torch.Generator().manual_seed(3)
    replaced = {
        name: tensor.detach() + by * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        for name, tensor in adapter.replaced.items()
    }
    return dataclasses.replace(adapter, replaced=replaced)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_bert"])
def test_starts_at_the_base_and_trains_norms(name):
    model, inputs = ZOO[name].fresh(torch.float64), ZOO[name].inputs()
    compiled = lorac.compile(model, {"a": LNTuning()})
    with torch.no_grad():
        assert_close(compiled(**inputs).logits, model(**inputs).logits)
    adapter = compiled.adapters["a"]
    assert not adapter.tensors
    norms = {n for n, _ in model.named_parameters() if LNTuning().replaces_module(n.rpartition(".")[0])}
    assert set(adapter.replaced) == norms
    compiled.train()
    trained = {id(p) for p in compiled.parameters() if p.requires_grad}
    assert trained == {id(t) for t in adapter.replaced.values()}
    compiled(**inputs).logits.square().sum().backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in adapter.replaced.values())


@pytest.mark.medium("live", cases=["fused"])
@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_swaps(mode):
    model, inputs = ZOO["tiny_bert"].fresh(torch.float64), ZOO["tiny_bert"].inputs()
    variant = LNTuning(targets=("LayerNorm",))
    adapter = moved(lorac.compile(model, {"a": variant}), 0.1)
    compiled = lorac.compile(model, {"a": adapter}, mode=mode)
    host = ZOO["tiny_bert"].fresh(torch.float64)
    for name, tensor in adapter.replaced.items():
        host.get_parameter(name).copy_(tensor)
    parity.assert_parity(compiled(**inputs), host(**inputs), model(**inputs), names=["logits"])
    compiled.swap(None)
    assert torch.equal(compiled(**inputs).logits, model(**inputs).logits)
    compiled.swap("a")
    parity.assert_parity(compiled(**inputs), host(**inputs), model(**inputs), names=["logits"])


def test_rejects_targets_without_norms():
    with refuses("site_not_found", match="layernrm"):
        lorac.compile(ZOO["tiny_llama"].model(), {"a": LNTuning(targets=("layernrm",))})
