"""Calls and swaps with plans, each replaced by the file from which it was built.

No plan runs without a GPU. So ``Running`` is stood in for by ONNX Runtime over the emitted model, which answers with
the numbers that the plan is to answer with; everything before it is the target's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.backends.tensorrt import backend, build
from lorac.backends.tensorrt import engine as engines
from lorac.backends.tensorrt.cpu_check import _create_session
from lorac.backends.tensorrt.device.device_slots import DeviceSlots
from lorac.backends.tensorrt.engine import TrtEngine
from lorac.testing import assert_close
from tests.backends.tensorrt.building import away, quietly
from tests.backends.tensorrt.tiny import LIBRARY

X = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(10, 14), nn.Linear(14, 9)

    def forward(self, x: Tensor) -> Tensor:
        return self.right(torch.tanh(self.left(x)))


class Standing:
    """A loaded plan, computed by ONNX Runtime on the CPU; counts its calls.

    Args:
        found: the engine whose plan it is.
    """

    def __init__(self, found: TrtEngine) -> None:
        self.session = _create_session(found.files, "main")
        self.laid_out, self.written = 0, 0

    def hold(self, tensors: Mapping[str, Tensor], *, fixed: bool = False) -> DeviceSlots:
        self.laid_out += 1
        return DeviceSlots(tensors, fixed=fixed)

    def call(self, inputs: Mapping[str, Tensor], slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = {name: tensor.numpy() for name, tensor in {**inputs, **slots}.items()}
        names = [value.name for value in self.session.get_outputs()]
        return dict(zip(names, map(torch.from_numpy, self.session.run(names, given)), strict=True))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        self.written += 1
        yield


def made(mode: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any, Standing]:
    """Return the model for eager and for TensorRT with the same adapters, and the stand-in for the plan."""
    torch.manual_seed(0)
    model = Net().eval()
    variants = {"a": lorac.LoRA(r=2, targets=["left"]), "b": lorac.LoRA(r=3, targets=["left", "right"])}
    eager = lorac.compile(model, variants, active="a", example_inputs=(X,))
    for seed, adapter in enumerate(eager.adapters.values()):
        away(adapter, seed)
    given = dict(eager.adapters)
    found = quietly(model=model, adapters=given, active="a", mode=mode, example_inputs=(X,), **options)
    standing = Standing(found.engine)
    monkeypatch.setattr(engines, "check_requirements", lambda: None)
    monkeypatch.setattr(found.engine, "_load", lambda graph: standing)
    return eager, found, standing


@pytest.mark.medium("live; test_engine.py writes fused weights", keep=["live"])
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
def test_matches_eager_after_every_swap(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, found, _ = made(mode, monkeypatch)
    choices = ["a"] if mode == "baked" else ["a", "b", None, {"a": 0.5, "b": 0.25}, "a"]
    answers = []
    for choice in choices:
        if mode != "baked":
            found.swap(choice)
        eager.swap(choice)
        answers.append(found(X))
        with torch.no_grad():
            assert_close(answers[-1], eager(X))
    assert torch.equal(answers[0], answers[-1])
    assert len({answer.sum().item() for answer in answers}) == len(set(map(str, choices)))


def test_copies_a_choice_once_and_accepts_a_choice_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, found, standing = made("live", monkeypatch)
    first = found(X)
    assert torch.equal(found(X), first) and standing.laid_out == 1
    with torch.no_grad():
        assert_close(found(X, adapters="b"), eager(X, adapters="b"))
    assert torch.equal(found(X), first) and standing.laid_out == 2
    assert isinstance(found(X.numpy()), type(X.numpy()))


@pytest.mark.medium("the options' casts")
def test_accepts_arrays_for_a_bfloat16_program(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found, standing = made("live", monkeypatch, dtype="bfloat16")
    taken = []

    def call(inputs: Mapping[str, Tensor], slots: object) -> dict[str, Tensor]:
        taken.extend(tensor.dtype for tensor in inputs.values())
        return {value.name: torch.ones(3, 9, dtype=torch.bfloat16) for value in standing.session.get_outputs()}

    monkeypatch.setattr(standing, "call", call)
    found_array, found_tensor = found(X.numpy()), found(X)
    assert found_array.dtype == np.float32 and found_tensor.dtype == torch.bfloat16
    assert taken == [torch.bfloat16] * 2


@pytest.mark.medium("rows of other targets")
def test_rows_have_a_choice_each(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, found, standing = made("live", monkeypatch)
    calls, run = list[int](), standing.call
    monkeypatch.setattr(standing, "call", lambda inputs, slots: (calls.append(1), run(inputs, slots))[1])
    for choices in (["a", None, "b"], ["b", "b", {"a": 0.5, "b": 0.25}], ["a", "a", "a"]):
        calls.clear()
        with torch.no_grad():
            assert_close(found(X, adapters=choices), eager(X, adapters=choices))
        assert len(calls) == 1, "one call of the plan"
    assert "rows: one call for any mix of adapters, up to 8 choices" in str(found.explain())


@pytest.mark.medium("test_options.py: a call outside the profile")
def test_rejects_more_choices_than_the_plan_was_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found, _ = made("live", monkeypatch, profiles={"adapters": (1, 1, 2)})
    found(X, adapters=["a", "a", "a"])
    with pytest.raises(lorac.InputMismatch, match="'adapters': \\(1, 1, 3\\)"):
        found(X, adapters=["a", None, "b"])


def test_weights_are_written_while_no_call_reads_them_and_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found, standing = made("fused", monkeypatch)
    found(X)
    for choice in ("b", "a"):
        found.swap(choice)
        found(X)
    assert standing.written == 2 and standing.laid_out == 1


@pytest.mark.medium("test_options.py: a call outside the profile")
def test_rejects_a_size_that_the_plan_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    _, found, _ = made("live", monkeypatch, profiles={"batch": (1, 2, 4)})
    found(X[:1])
    with pytest.raises(lorac.InputMismatch, match="batch"):
        found(torch.cat([X, X]))


@pytest.mark.medium("test_engine.py builds two plans and compares them")
def test_a_plan_that_was_built_before_is_not_built_again(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    real = build._build_plan
    monkeypatch.setattr(build, "_build_plan", lambda *args: built.append(args[1]) or real(*args))
    _, one, _ = made("live", monkeypatch, plan_cache=str(tmp_path))
    _, other, _ = made("live", monkeypatch, plan_cache=str(tmp_path))
    assert built == ["main"]
    plans = [found.engine.graphs["main"].file.read() for found in (one, other)]
    assert plans[0] == plans[1]
    one.save(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "manifest.json").read_text()
    with pytest.warns(lorac.LoracWarning, match="cannot run here"):
        loaded = lorac.load(tmp_path / "saved")
    with warnings.catch_warnings(), pytest.raises(lorac.LoracWarning, match="cannot run here"):
        warnings.simplefilter("error")
        lorac.load(tmp_path / "saved")
    assert loaded.engine.options == dataclasses.replace(one.engine.options, plan_cache=None, library=LIBRARY.name)
    with pytest.warns(lorac.LoracWarning, match="cannot run here"):
        again = lorac.load(tmp_path / "saved", plan_cache=str(tmp_path), cuda_graphs=True)
    assert again.engine.options.plan_cache == str(tmp_path) and "CUDA graphs: one for each" in str(again.explain())
    made("live", monkeypatch, plan_cache=str(tmp_path), profiles={"batch": (1, 2, 4)})
    made("live", monkeypatch, plan_cache=str(tmp_path), tf32=True)
    assert built == ["main"] * 3


def test_weights_that_are_constants_are_replaced_in_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the plan, which the library builds so only where there is a GPU."""
    written: list[set[str]] = []

    class Replacing:
        def __init__(self, engine: object, memory: Mapping[str, Tensor], library: object) -> None:
            self.memory = memory

        def write(self, touched: frozenset[str]) -> int:
            written.append(set(touched))
            return 0

    class Loaded(Standing):
        engine = library = None

        def __init__(self, plan: Any, device: object, **options: object) -> None:
            happened.append(type(plan).__name__)
            assert plan[:] == found.engine.graphs["main"].file.read()

    monkeypatch.setattr(engines, "WeightRefitter", Replacing)
    happened: list[str] = []
    monkeypatch.setattr(engines, "finish_device", lambda device: happened.append("every stream has ended"))
    monkeypatch.setattr(engines, "PlanRunner", Loaded)
    monkeypatch.setattr(backend, "local_capability", lambda: "8.6")
    marked: list[set[str]] = []
    real = build.mark_refittable
    monkeypatch.setattr(
        build, "mark_refittable", lambda network, names: marked.append(set(names)) or real(network, names)
    )
    monkeypatch.setattr(build, "refit_flag", lambda library: library.module.BuilderFlag.STRICT_NANS)
    torch.manual_seed(0)
    model, adapters = Net().eval(), {"a": lorac.LoRA(r=2, targets=["left"]), "b": lorac.LoRA(r=3, targets=["right"])}
    found: Any = quietly(model=model, adapters=adapters, active="a", mode="fused", example_inputs=(X,), refit=True)
    for adapter in found.adapters.values():
        away(adapter, 1)
    assert marked == [{"left:weight", "right:weight"}]
    assert found.engine._load("main") is not None
    assert happened == ["every stream has ended", "mmap"], "weights are written by then, and the plan is mapped"
    found.swap("b")
    found.swap(None)
    assert written == [{"left:weight"}, {"right:weight"}, set()]
