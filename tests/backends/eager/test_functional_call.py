"""Tensors given for a call by ``torch.func.functional_call`` are those that the call computes with."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import lorac
from lorac.session.compiled import CompiledModule
from lorac.testing import assert_close
from lorac.variants.base import Variant
from tests.refusing import refuses

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
METHODS = [
    lorac.LoRA(r=2, targets=["0"], bias="lora_only"),
    lorac.DoRA(r=2, targets=["0"]),
    lorac.OFT(block_size=2, targets=["0"]),
    lorac.VeRA(r=2, targets=["0"]),
]


def _compile(mode: str, method: Variant = METHODS[0]) -> CompiledModule:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    compiled = lorac.compile(model, {"a": method}, mode=mode, example_inputs=(X,))
    assert isinstance(compiled, CompiledModule)
    return compiled


def _given(compiled: CompiledModule) -> dict[str, Tensor]:
    """Return other tensors for all parameters."""
    return {name: tensor.detach() + 0.3 * torch.randn(tensor.shape) for name, tensor in compiled.named_parameters()}


def _written(compiled: CompiledModule, given: dict[str, Tensor]) -> CompiledModule:
    """Return a model compiled over these tensors."""
    host = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    host.load_state_dict({name.removeprefix("host."): tensor for name, tensor in compiled.host.state_dict().items()})
    with torch.no_grad():
        for name, tensor in given.items():
            if name.startswith("host."):
                host.get_parameter(name.removeprefix("host.")).copy_(tensor)
        other = lorac.compile(host, {"a": compiled.adapters["a"].variant}, mode=compiled.mode, example_inputs=(X,))
        assert isinstance(other, CompiledModule)
        own = dict(other.named_parameters())
        for name, tensor in given.items():
            if name.startswith("adapter_tensors."):
                own[name].copy_(tensor)
    return other


@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_computes_with_the_given_tensors(method: Variant, mode: str) -> None:
    compiled = _compile(mode, method)
    before = compiled(X).detach()
    given = _given(compiled)
    expected = _written(compiled, given)
    assert_close(functional_call(compiled, given, (X,)), expected(X))
    with torch.no_grad():
        assert_close(functional_call(compiled, given, (X,)), expected(X))
    gradients = grad(lambda tensors: functional_call(compiled, tensors, (X,)).square().sum())(given)
    expected(X).square().sum().backward()
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            assert_close(gradients[name], parameter.grad)
    assert gradients["host.0.weight"].any()
    with torch.no_grad():
        assert torch.equal(compiled(X), before)  # nothing stays


def test_batches_adapters_under_vmap() -> None:
    compiled = _compile("live")
    sets = [_given(compiled) for _ in range(2)]
    stacked = {name: torch.stack([given[name] for given in sets]) for name in sets[0]}
    together = vmap(lambda tensors: functional_call(compiled, tensors, (X,)))(stacked)
    for given, output in zip(sets, together, strict=True):
        assert_close(output, functional_call(compiled, given, (X,)))


def test_rejects_a_weight_that_swaps_write_in_place() -> None:
    attention = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)).eval()
    adapters = [lorac.LoRA(r=2, targets=["out_proj"])]
    compiled = lorac.compile(attention, adapters, mode="fused", example_inputs=(X[None],))
    assert isinstance(compiled, CompiledModule)
    given = {name: tensor.clone() for name, tensor in compiled.named_parameters()}
    with refuses("unavailable", match=r"(?s)weight of '0\.self_attn\.out_proj'.*mode='live'.*adapter_tensors\."):
        functional_call(compiled, given, (X[None],))
    own = {name: tensor for name, tensor in given.items() if name.startswith("adapter_tensors.")}
    assert_close(functional_call(compiled, own, (X[None],)), compiled(X[None]))
