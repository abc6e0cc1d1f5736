"""torch's own transformer layers are adapted inside, in evaluation too, where torch would run them as one kernel."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lorac
from lorac.testing import adapter_away, assert_close, assert_parity


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found, expected)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(nn.TransformerEncoder(layer, 2)).double().eval()


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("target", ["linear1", "linear2"])
def test_adapters_act_inside_a_layer_with_a_fast_path(target: str, gradients: bool, model: nn.Module) -> None:
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    adapter = adapter_away(lorac.LoRA(r=2, targets=[target]), model, x, name="a", seed=1)
    compiled = lorac.compile(model, {"a": adapter})
    baked = lorac.compile(model, {"a": adapter}, mode="baked")
    with torch.set_grad_enabled(gradients):
        assert_parity(compiled(x), baked(x), model(x))
        compiled.swap(None)
        # Attention multiplies by weights of no layer, which torch folds by whether they need gradients.
        (assert_close if gradients else assert_equal)(compiled(x), model(x))


@torch.no_grad()
def test_accepts_a_layer_with_a_fast_path_as_the_model(model: nn.Module) -> None:
    layer, x = model.get_submodule("0.layers.0"), torch.randn(2, 5, 16, dtype=torch.float64)
    adapter = adapter_away(lorac.LoRA(r=2, targets=["linear1"]), layer, x, name="a", seed=1)
    assert_parity(
        lorac.compile(layer, {"a": adapter})(x), lorac.compile(layer, {"a": adapter}, mode="baked")(x), layer(x)
    )


def test_trains_in_evaluation_mode(model: nn.Module) -> None:
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=["linear1"])})
    compiled(torch.randn(2, 5, 16, dtype=torch.float64)).sum().backward()
    assert all(tensors["lora_B"].grad is not None for tensors in compiled.adapters["a"].tensors.values())
