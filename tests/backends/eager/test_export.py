"""torch's exporters take a compiled model, with the active adapters in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lorac
from lorac.testing import assert_close

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def _trained(method: Any) -> tuple[nn.Module, lorac.Adapter]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    adapter = lorac.compile(model, {"a": method}, example_inputs=(X,)).adapters["a"]
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, adapter


@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
@pytest.mark.parametrize("method", [lorac.LoRA(r=2), lorac.DoRA(r=2)], ids=lambda method: method.name)
@pytest.mark.parametrize("records", [True, False], ids=["gradients", "no gradients"])
def test_exports_the_active_adapters(method: Any, mode: str, records: bool) -> None:
    model, adapter = _trained(method)
    compiled: Any = lorac.compile(model, {"a": adapter}, mode=mode, active="a", example_inputs=(X,))
    expected = compiled(X).detach()
    assert (expected - model(X)).abs().max() > 0.1
    with torch.set_grad_enabled(records):
        program = torch.export.export(compiled, (X,))
    assert_close(program.module()(X).detach(), expected)
    assert_close(compiled(X).detach(), expected)


def test_exports_tensors_as_they_are_now() -> None:
    """A write that torch does not count is seen while a program is traced, too."""
    model, adapter = _trained(lorac.LoRA(r=2))
    compiled: Any = lorac.compile(model, {"a": adapter}, mode="fused", active="a", example_inputs=(X,))
    with torch.no_grad():
        compiled(X)
        next(iter(adapter.parameters())).data.mul_(3)
        program = torch.export.export(compiled, (X,))
        assert_close(program.module()(X), compiled(X))


@pytest.mark.medium("test_exports_the_active_adapters")
def test_onnx_takes_a_baked_model() -> None:
    model, adapter = _trained(lorac.LoRA(r=2))
    compiled: Any = lorac.compile(model, {"a": adapter}, mode="baked", active="a", example_inputs=(X,))
    program = torch.onnx.export(compiled, (X,), dynamo=True, verbose=False)
    assert program is not None
    assert_close(program(X)[0], compiled(X).detach())
