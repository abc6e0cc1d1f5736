"""Swapped to none, the eager target answers the host's own bits, also where torch folds products by their gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorac


class Turned(nn.Module):
    """Layers whose inputs lie turned in memory, as images' channels and heads' axes do."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 5, bias=bias), nn.Linear(17, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x.transpose(0, 1))).transpose(0, 2))


def made(bias: bool) -> tuple[Turned, torch.Tensor]:
    torch.manual_seed(0)
    return Turned(bias=bias), torch.randn(3, 17, 24)


@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("bias", [True, False])
def test_no_adapter_is_the_host_bit_for_bit(bias: bool, mode: str) -> None:
    net, x = made(bias)
    compiled = lorac.compile(net, {"a": lorac.DoRA(r=2, targets=["first", "second"])}, mode=mode)
    compiled.swap(None)
    assert torch.equal(compiled(x), net(x))
    with torch.no_grad():
        original = net(x)
        assert torch.equal(compiled(x), original)
        assert not torch.equal(net.requires_grad_(False)(x), original), "torch folds both alike: this decides nothing"


def test_layers_that_share_a_weight_round_as_the_model() -> None:
    differs = []
    for size in (17, 257):  # which of them torch folds in two ways depends on the processor
        torch.manual_seed(0)
        net, x = Turned(bias=True), torch.randn(3, size, size)
        net.first, net.second = nn.Linear(size, size), nn.Linear(size, size)
        net.second.weight = net.first.weight
        compiled = lorac.compile(net, {"a": lorac.LoRA(r=2, targets=["first", "second"])}, active=None)
        with torch.no_grad():
            original = net(x)
            assert torch.equal(compiled(x), original)
            differs.append(not torch.equal(net.requires_grad_(False)(x), original))
    assert any(differs), "torch folds both alike: this decides nothing"


def test_a_model_without_gradients_rounds_as_before() -> None:
    net, x = made(True)
    net.requires_grad_(False)
    compiled = lorac.compile(net, {"a": lorac.LoRA(r=2)}, active=None)
    assert torch.equal(compiled(x), net(x))


def test_under_autocast_too() -> None:
    net, x = made(True)
    compiled = lorac.compile(net, {"a": lorac.LoRA(r=2)}, active=None)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(compiled(x), net(x))


def test_an_axis_of_size_1_may_have_any_stride() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(386, 768, bias=False)), torch.randn(2, 386).as_strided((2, 1, 386), (386, 1, 1))
    compiled = lorac.compile(net, {"a": lorac.LoRA(r=2, targets=["0"])}, active=None)
    with torch.no_grad():
        original = net(x)
        assert x.is_contiguous()
        assert torch.equal(compiled(x), original)
        assert not torch.equal(net.requires_grad_(False)(x), original), "torch folds both alike: this decides nothing"
