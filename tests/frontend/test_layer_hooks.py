"""Forward hooks of adapted layers: those that look on stay, those that change something are refused everywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from tests.refusing import refuses

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
CHANGING: dict[str, tuple[str, Callable[..., Any]]] = {
    "output": ("register_forward_hook", lambda module, args, output: output * 3),
    "output in place": ("register_forward_hook", lambda module, args, output: [output.mul_(3), None][1]),
    "input": ("register_forward_pre_hook", lambda module, args: args[0] * 2),
}


def host() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).eval()


def compiled_of(
    model: nn.Module, target: str, mode: str = "live", targets: Sequence[str] = ("0", "2")
) -> lorac.Compiled:
    return lorac.compile(model, [drawn(model, targets)], target=target, mode=mode, example_inputs=(X,))


def drawn(model: nn.Module, targets: Sequence[str]) -> lorac.Adapter:
    """Return a LoRA away from its first values."""
    generator, sites = torch.Generator().manual_seed(1), lorac.sites(model)
    tensors = {
        path: {
            "lora_A": torch.randn(2, sites[path].in_features, generator=generator),
            "lora_B": torch.randn(sites[path].out_features, 2, generator=generator),
        }
        for path in targets
    }
    return lorac.Adapter("a", lorac.LoRA(r=2, targets=tuple(targets)), tensors)


@pytest.mark.medium(
    "eager live programs, and a hook on the output",
    cases=["*-fused", "input-onnxruntime-*", "output in place-onnxruntime-live"],
)
@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("name", CHANGING)
def test_rejects_hooks_that_change_an_adapted_layer(name: str, target: str, mode: str) -> None:
    model = host()
    register, hook = CHANGING[name]
    getattr(model[0], register)(hook)
    with refuses("site_unsupported", match="the forward hook .* of '0' changes inputs or outputs of the layer"):
        compiled_of(model, target, mode)(X)
    # The way out: elsewhere it is a part of the model.
    answer = compiled_of(model, target, mode, ["2"])
    answer.swap(None)
    assert_close(answer(X), model(X))


@pytest.mark.medium("eager", cases=["onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_keeps_hooks_that_only_observe(target: str) -> None:
    plain, model = host(), host()
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    model[2].register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
    answer = compiled_of(model, target)(X)
    assert_close(answer, compiled_of(plain, target)(X))
    assert seen


def test_hooks_act_while_no_adapter_does() -> None:
    model = host()
    model[0].register_forward_hook(lambda module, args, output: output * 3)
    compiled = compiled_of(model, "eager")
    compiled.swap(None)
    assert_close(compiled(X), model(X))
