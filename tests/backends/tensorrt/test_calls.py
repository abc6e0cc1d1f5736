"""The way of a call through the engine, up to the plan: in its place ONNX Runtime runs the file it was built of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lorac
from lorac.backends.tensorrt import engine as engines
from lorac.testing.parity import assert_parity
from tests.backends.tensorrt.building import THREE, Built, away, seen
from tests.backends.tensorrt.test_engine import X, host, low


class InItsPlace:
    """Runs an emitted file as a plan would be, and remembers what it was told.

    Args:
        built: whose file.
    """

    def __init__(self, built: Built) -> None:
        self.built, self.loaded, self.held = built, list[Any](), list[bool]()

    def __call__(self, plan: bytes, device: torch.device, **told: Any) -> InItsPlace:
        """What loads a plan."""
        self.loaded.append((plan, device, told))
        return self

    def call(self, inputs: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert all(tensor.is_contiguous() for tensor in (*inputs.values(), *slots.values()))
        found = self.built.tried.outputs("main", slots, inputs)
        return dict(zip(self.built.program.signatures["main"].outputs, found, strict=True))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        before = {name: tensor.clone() for name, tensor in self.built.engine.memory.items()}
        yield
        self.held.append(any(not torch.equal(before[name], t) for name, t in self.built.engine.memory.items()))


@pytest.fixture(params=["live", "fused"])
def placed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> InItsPlace:
    adapters = {"a": low(2, "conv", "left"), "b": lorac.DoRA(r=1, targets=["right"])}
    built = seen(
        model=host(), adapters=adapters, mode=request.param, active=None, example_inputs=(X,), cuda_graphs=True
    )
    for number, adapter in enumerate(built.compiled.adapters.values()):
        away(adapter, number)
    made = InItsPlace(built)
    monkeypatch.setattr(engines, "refuse_lacking", lambda: None)
    monkeypatch.setattr(engines, "_running", lambda: made)
    return made


@torch.no_grad()
def test_a_call_reads_what_is_active(placed):
    """As eager does, for choices, strengths and rows of other numbers; the plan is loaded once."""
    compiled = placed.built.compiled
    eager = lorac.compile(host(), dict(compiled.adapters), active=None)
    base = compiled(X)
    for choice in ("a", "b", {"a": 0.5, "b": 0.7}):
        compiled.swap(choice)
        eager.swap(choice)
        for x in (X, X[:1], torch.cat([X, X])):
            assert_parity(compiled(x), eager(x), host()(x), own_base=compiled(x, adapters=None))
    compiled.swap(None)
    assert torch.equal(compiled(X), base)
    ((plan, device, told),) = placed.loaded
    assert plan == placed.built.plan and device == placed.built.engine.device
    assert told == {"capabilities": tuple(THREE), "cuda_graphs": True}


def test_what_calls_read_is_written_while_none_is_queued(placed):
    compiled = placed.built.compiled
    compiled(X)
    compiled.swap("a")
    assert placed.held == ([True] if placed.built.engine.fused else [])


def test_it_answers_as_it_is_called(placed):
    compiled = placed.built.compiled
    answered = compiled(X.numpy())
    assert isinstance(answered, np.ndarray) and isinstance(compiled(X), Tensor)
    assert torch.equal(torch.from_numpy(answered), compiled(X.double()))  # any precision is taken, as the host's is
    with pytest.raises(lorac.InputMismatch, match="the plan is for 1 to 8"):
        compiled(torch.cat([X, X, X]))
