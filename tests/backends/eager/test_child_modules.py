"""Libraries that replace modules or weights of a compiled model in place: refused, since no program would have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import lorac
from tests.refusing import refuses

X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
CONFIG = LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.head, self.out = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(torch.tanh(self.head(self.body(x).mean((2, 3)))))
        return result


def _compile() -> Any:
    return lorac.compile(Host().eval(), {"a": lorac.LoRA(r=2, targets=["out"])}, example_inputs=(X,))


def _assign(compiled: Any) -> None:
    compiled.host.head = nn.Linear(4, 6)


def _write(compiled: Any) -> None:
    """As bitsandbytes' replacement does."""
    compiled.host._modules["out"] = nn.Linear(6, 2)


def _fuse(compiled: Any) -> None:
    torch.ao.quantization.fuse_modules(compiled.host, [["body.0", "body.1"]], inplace=True)


REPLACING: dict[str, tuple[Callable[[Any], object], str]] = {
    "get_peft_model": (lambda compiled: get_peft_model(compiled, CONFIG), "'head' of .* became peft's Linear"),
    "inject": (lambda compiled: inject_adapter_in_model(CONFIG, compiled), "'head' of .* became peft's Linear"),
    "assign": (_assign, "'head' of .* became torch's Linear"),
    "write": (_write, "'out' of .* became torch's Linear"),
    "fuse": (_fuse, "'body.0', 'body.1' of .* became torch's Conv2d, torch's Identity"),
    "delete": (lambda compiled: compiled.host.body.__delitem__(2), "'body.2' of .* became nothing"),
}


@pytest.mark.parametrize("name", REPLACING)
def test_rejects_replaced_modules(name: str, tmp_path: Path) -> None:
    compiled = _compile()
    replace, message = REPLACING[name]
    replace(compiled)
    for use in (
        lambda: compiled(X),
        lambda: compiled(X, adapters=None),
        lambda: compiled.train()(X),
        lambda: compiled.export(target="onnxruntime"),
        lambda: compiled.save(tmp_path / "saved"),
    ):
        with refuses("unavailable", match=message):
            use()
    assert not (tmp_path / "saved").exists()


def _give(compiled: Any) -> None:
    compiled.host.out.weight = nn.Parameter(torch.zeros(2, 6))


@pytest.mark.parametrize("replace", [_give, lambda compiled: weight_norm(compiled.host.out)])
def test_rejects_replaced_weights_in_programs(replace: Callable[[Any], object], tmp_path: Path) -> None:
    compiled = _compile()
    replace(compiled)
    for use in (lambda: compiled.export(target="onnxruntime"), lambda: compiled.save(tmp_path / "saved")):
        with refuses("unavailable", match="the weight of 'out', where adapters act, was replaced"):
            use()


@torch.no_grad()
def test_keeps_modules_that_are_wrapped_or_added() -> None:
    compiled = _compile()
    expected = compiled(X)
    compiled.host.body = torch.compile(compiled.host.body, backend="eager", disable=True)
    compiled.host.head = nn.Sequential(compiled.host.head)
    compiled.host.further = nn.Linear(2, 2)
    assert torch.equal(compiled(X), expected)
    compiled.host.head = nn.Linear(4, 6)
    with refuses("unavailable", match="'head' of a compiled model became"):
        compiled(X)
