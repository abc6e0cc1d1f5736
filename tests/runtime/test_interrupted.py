"""An interrupted or failing swap, add or remove happens whole or not at all (invariant 7)."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lorac
from lorac.adapters.pool import AdapterPool
from lorac.backends.eager.engine import EagerEngine
from lorac.backends.onnxruntime.engine import OrtEngine
from lorac.ir.slots.weight_writes import SparseWrites
from lorac.runtime.choice_states import ChoiceStates
from lorac.session import compiled as running
from lorac.session.compiled import CompiledModule
from tests.runtime.interrupts import interrupted
from tests.runtime.switching import MIXTURE, adapter, answer, build, pair, raw

ENGINES = [(target, mode) for target in ("eager", "onnxruntime") for mode in ("live", "fused")]
Expected = dict[str, bytes]
every = pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
"""Number of lines between two interrupts."""


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def compiled(request: pytest.FixtureRequest) -> lorac.Compiled:
    """Two adapters; every test leaves it with them, "a" active."""
    made = build(pair("lora", "shira"), *request.param)
    made.swap("a")
    return made


@pytest.fixture(scope="module")
def expected(compiled: lorac.Compiled) -> Expected:
    """The output of every choice; "c" is "a" under another name."""
    found = {}
    for spec in ("a", "b", MIXTURE, None):
        compiled.swap(spec)
        found[str(compiled.active)] = raw(answer(compiled))
    compiled.swap("a")
    found[str({"c": 1.0})] = found[str({"a": 1.0})]
    return found


def _names(compiled: lorac.Compiled) -> list[str]:
    return list(compiled.state_dict()) if isinstance(compiled, CompiledModule) else []


def _answers_in_time(compiled: lorac.Compiled) -> bytes:
    """Return the answer in another thread, which would wait for ever for a lock that was not released."""
    found: list[bytes] = []
    asking = threading.Thread(target=lambda: found.append(raw(answer(compiled))), daemon=True)
    asking.start()
    asking.join(20)
    assert found, "the model hangs"
    return found[0]


def _check(compiled: lorac.Compiled, expected: Expected) -> None:
    """It answers as what it says is active, and the adapters it names are all there."""
    assert _answers_in_time(compiled) == expected[str(compiled.active)] == raw(answer(compiled))
    held = {name.split(".")[1] for name in _names(compiled) if name.startswith("adapter_tensors.")}
    assert not held or held == set(compiled.adapters)
    for name in compiled.adapters:
        assert raw(answer(compiled, adapters=name)) == expected[str({name: 1.0})]


@pytest.mark.medium("live on ONNX Runtime", keep=["onnxruntime-live-7"])
@every
def test_swaps(stride: int, compiled: lorac.Compiled, expected: Expected) -> None:
    for _ in interrupted(lambda: compiled.swap(MIXTURE), stride):
        assert compiled.active in ({"a": 1.0}, MIXTURE)
        _check(compiled, expected)
        compiled.swap("a")


@pytest.mark.medium("live in eager", keep=["eager-live-7"])
@every
def test_an_interrupted_call_with_its_own_choice(stride: int, compiled: lorac.Compiled, expected: Expected) -> None:
    for _ in interrupted(lambda: answer(compiled, adapters="b"), stride):
        assert compiled.active == {"a": 1.0}
        _check(compiled, expected)


@pytest.mark.medium("live in eager", keep=["eager-live-7"])
@every
def test_calls(stride: int, compiled: lorac.Compiled, expected: Expected) -> None:
    for _ in interrupted(lambda: answer(compiled), stride):
        _check(compiled, expected)
        compiled.swap("b"), compiled.swap("a")


@pytest.mark.medium("live in eager", keep=["eager-live-7"])
@every
def test_adding_and_removing(stride: int, compiled: lorac.Compiled, expected: Expected) -> None:
    new = adapter("lora", "a")

    def come_and_go() -> None:
        compiled.add_adapter(new, name="c")
        compiled.swap("c")
        compiled.remove_adapter("c")

    for _ in interrupted(come_and_go, 3 * stride):
        assert set(compiled.adapters) in ({"a", "b"}, {"a", "b", "c"})
        _check(compiled, expected)
        if "c" in compiled.adapters:
            compiled.remove_adapter("c")
        compiled.swap("a")


# ── Failures ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _failing_once(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    honest, left = getattr(owner, name), [1]

    def fail(*given: Any, **named: Any) -> Any:
        if left:
            left.pop()
            raise MemoryError(name)
        return honest(*given, **named)

    patch.setattr(owner, name, fail)


ADDING: list[tuple[Any, str]] = [
    (running, "check_capacity"),
    (AdapterPool, "prepare"),
    (AdapterPool, "add"),
    (CompiledModule, "_on_adapters_changed"),
    (ChoiceStates, "of"),
    (EagerEngine, "bind"),
    (OrtEngine, "bind"),
]
REMOVING: list[tuple[Any, str]] = [
    (AdapterPool, "remove"),
    (ChoiceStates, "forget"),
    (CompiledModule, "_on_adapters_changed"),
]


def _named(steps: list[tuple[Any, str]]) -> list[str]:
    return [f"{owner.__name__.rpartition('.')[2]}.{name}" for owner, name in steps]


@pytest.mark.parametrize(("owner", "name"), ADDING, ids=_named(ADDING))
def test_an_adapter_that_fails_to_be_added_leaves_no_trace(
    owner: Any, name: str, compiled: lorac.Compiled, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _names(compiled)
    _failing_once(monkeypatch, owner, name)
    try:
        compiled.add_adapter(adapter("lora", "a"), name="c")
    except MemoryError:
        assert list(compiled.adapters) == ["a", "b"]
        assert _names(compiled) == names
    monkeypatch.undo()
    if "c" not in compiled.adapters:  # else this engine does not go through the step
        compiled.add_adapter(adapter("lora", "a"), name="c")
    _check(compiled, expected)
    compiled.remove_adapter("c")
    assert _names(compiled) == names


@pytest.mark.parametrize(("owner", "name"), REMOVING, ids=_named(REMOVING))
def test_an_adapter_that_fails_to_be_removed_stays(
    owner: Any, name: str, compiled: lorac.Compiled, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _names(compiled)
    if owner is CompiledModule and not names:
        return
    _failing_once(monkeypatch, owner, name)
    with pytest.raises(MemoryError):
        compiled.remove_adapter("a")
    assert set(compiled.adapters) == {"a", "b"}
    assert compiled.active == {"a": 1.0}
    assert _names(compiled) == names
    _check(compiled, expected)


def _failing(honest: Callable[[Any, SparseWrites], int], calls: list[bool]) -> Callable[[Any, SparseWrites], int]:
    """A method that fails at those of its calls for which the list says so."""

    def start_write(change: Any, sparse: SparseWrites) -> int:
        if calls and calls.pop(0):
            raise MemoryError
        return honest(change, sparse)

    return start_write


def test_rewrites_weights_that_could_not_be_restored(
    compiled: lorac.Compiled, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A swap fails half-way, and so does what undoes it."""
    if compiled.mode != "fused":
        pytest.skip("live mode writes no weights")
    first, *_, last = compiled.engine.buffers.values()
    for buffer, calls in ((first, [False, True]), (last, [True])):
        monkeypatch.setattr(buffer, "start_write", _failing(buffer.start_write, calls))
    with pytest.raises(MemoryError):
        compiled.swap("b")
    assert compiled.active == {"a": 1.0}
    _check(compiled, expected)


# ── What is kept follows the adapters ────────────────────────────────────────────────────────────────────────────────
def test_a_tensor_written_or_exchanged_is_served(compiled: lorac.Compiled, expected: Expected) -> None:
    compiled.add_adapter(adapter("lora", "a"), name="c")
    tensors, once = compiled.adapters["c"].tensors["up"], expected[str({"a": 1.0})]
    assert raw(answer(compiled, adapters="c")) == once
    before = tensors["lora_B"]
    tensors["lora_B"] = torch.nn.Parameter(before.detach() * 2)  # never written, as the one before
    assert tensors["lora_B"]._version == before._version
    twice = raw(answer(compiled, adapters="c"))
    assert twice != once
    tensors["lora_B"] = before
    assert raw(answer(compiled, adapters="c")) == once
    with torch.no_grad():
        before.mul_(2.0)
    assert raw(answer(compiled, adapters="c")) == twice
    compiled.remove_adapter("c")
    compiled.add_adapter(adapter("lora", "a"), name="c")
    assert raw(answer(compiled, adapters="c")) == once
    compiled.remove_adapter("c")
