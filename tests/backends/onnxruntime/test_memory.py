"""The memory that sessions read: tensors where they lie, and copies of them in ONNX Runtime's own memory.

The second is how a GPU is reached that this torch has no build for. ONNX Runtime has such memory on the CPU too, where
it is tried: what is bound, exchanged and written is the same there to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lorac
from lorac.backends.onnxruntime import engine
from lorac.backends.onnxruntime.devices.memory import (
    HostMemory,
    OrtDeviceMemory,
    as_ort_value,
    as_tensor,
    empty_at,
    memory_at,
)
from lorac.testing import assert_close

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool)


class Net(nn.Module):
    """Two layers, the second with a bias next to its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 4)."""
        return self.down(torch.tanh(self.up(x)))


def adapters() -> dict[str, lorac.Adapter]:
    """Return one adapter per form, away from their init."""
    methods = {
        "lora": lorac.LoRA(r=2, targets=["up", "down"]),
        "sparse": lorac.SHiRA(r=1, targets=["up"]),
        "dense": lorac.BAT(r=2, targets=["down"]),
    }
    made = lorac.compile(Net(), methods, active=None).adapters
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for a in made.values() for p in a.parameters() if p.is_floating_point()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return dict(made)


def compiled(mode: str, memory: type | None, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a model whose values lie in such memory."""
    if memory is not None:
        monkeypatch.setattr(engine, "memory_at", memory)
    made = lorac.compile(Net(), adapters(), "onnxruntime", (torch.ones(3, 6),), mode=mode, active=None)
    assert isinstance(made.engine.device_memory, memory or HostMemory)  # type: ignore[attr-defined]  # it is emitted
    return made


@pytest.mark.medium("live programs", cases=["fused"])
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_program_over_copies_answers_the_same_bits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, copied = compiled(mode, None, monkeypatch), compiled(mode, OrtDeviceMemory, monkeypatch)
    x = torch.randn(5, 6)
    for choice in ("lora", "sparse", {"sparse": 0.5}, None, "dense", {"lora": 0.7, "dense": 0.3}, None, "lora"):
        for made in (plain, copied):
            made.swap(choice)
        assert torch.equal(copied(x), plain(x))
    assert_close(copied(x), lorac.compile(Net(), plain.adapters, active="lora")(x))


def test_shares_the_memory_of_two_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled("live", OrtDeviceMemory, monkeypatch)
    memory, tensor = made.engine.device_memory, torch.randn(3, 4)
    assert memory.to_value(tensor) is memory.to_value(tensor) is not memory.to_value(tensor.clone())


def test_copies_only_written_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    made = compiled("fused", OrtDeviceMemory, monkeypatch)
    made.swap("lora")
    brought: list[int] = []
    of_values = type(made.engine.device_memory.to_value(torch.ones(1)))
    as_ever = of_values.update_inplace

    def update(value: Any, given: Any) -> None:
        brought.append(given.tensor_size_in_bytes())
        as_ever(value, given)

    monkeypatch.setattr(of_values, "update_inplace", update)
    made.swap("lora")
    assert not brought
    made.swap({"lora": 1.0, "dense": 1.0})  # at 'down' it is another weight, and at 'up' the same
    assert brought and sum(brought) < sum(tensor.nbytes for tensor in made.engine.memory.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 4), (), (4, 0)])
def test_values_of_any_dtype_and_shape_come_and_go(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.randn(shape) > 0) if dtype == torch.bool else (torch.randn(shape) * 10).to(dtype)
    there = OrtDeviceMemory(CPU).to_value(tensor)
    for value in (as_ort_value(tensor), there):
        assert torch.equal(as_tensor(value), tensor) and as_tensor(value).dtype == dtype
    if tensor.numel():
        assert as_ort_value(tensor).data_ptr() == tensor.data_ptr() != there.data_ptr()
    assert list(empty_at(CPU, tensor).shape()) == list(shape)


def test_reads_cpu_tensors_without_a_copy() -> None:
    memory, tensor = memory_at(CPU), torch.randn(3, 4)
    assert memory.to_value(tensor).data_ptr() == tensor.data_ptr()
    turned = memory.to_value(tensor.t())
    assert np.array_equal(turned.numpy(), tensor.t()) and memory.output_device([tensor]) == ("cpu", 0)
