"""Calls of a plan: the shapes and addresses that calls and swaps set, and errors where no plan runs."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import lorac
from lorac.backends.tensorrt import plan_runner as running
from lorac.backends.tensorrt.device import device_slots, requirements
from lorac.backends.tensorrt.device.device_slots import DeviceSlots, copy_to_engine
from lorac.backends.tensorrt.device.interfaces import IOTensor, IOTensors
from lorac.backends.tensorrt.plan_cache import PlanCache
from lorac.backends.tensorrt.plan_runner import ContextPool, PlanRunner
from tests.backends.tensorrt import engines, tiny
from tests.backends.tensorrt.tiny import CPU, IN, LIBRARY, OUT, RANK, ROWS, Lanes

Tensor = torch.Tensor
HERE = requirements.missing_requirement()
without_cuda = pytest.mark.skipif(HERE is None, reason="what is refused where there is no CUDA, and here is CUDA")


def _calls(*, depends: bool = False) -> tuple[ContextPool, Lanes]:
    io = tiny.io(sizes_depend_on_values=depends)
    executions = Lanes(io)
    return ContextPool(io, CPU, executions), executions


def _x(rows: int = 2, seed: int = 0) -> Tensor:
    return tiny.placed(torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed)))


def _log(executions: Lanes) -> list[tuple[object, ...]]:
    """Return the calls of the one context since the last ``_log``."""
    (context,) = executions.made
    noted = list(context.calls)
    context.calls.clear()
    return noted


# --- calls ------------------------------------------------------------------------------------------------------------
def test_computes_with_its_slots_and_inputs() -> None:
    calls, _ = _calls()
    for seed, rank, rows in ((1, 1, 1), (2, RANK, ROWS), (3, 2, 2)):
        slots, x = tiny.drawn(seed, rank), _x(rows, seed)
        assert torch.equal(calls.call({"x": x}, calls.hold(slots))["y"], tiny.computed(x, **slots))


def test_a_first_call_sets_shapes_and_addresses() -> None:
    calls, executions = _calls()
    calls.call({"x": _x()}, calls.hold(tiny.drawn(1)))
    bindings = [(method, name) for name in "abx" for method in ("set_input_shape", "set_tensor_address")]
    assert _log(executions) == [*bindings, ("infer_shapes",), ("set_tensor_address", "y"), ("execute_async_v3", 7)]


def test_a_repeated_call_sets_only_the_address_of_the_output() -> None:
    calls, executions = _calls()
    x, slots = _x(), calls.hold(tiny.drawn(1))
    answer = calls.call({"x": x}, slots)
    _log(executions)
    calls.call({"x": x}, slots)
    assert _log(executions) == [("set_tensor_address", "y"), ("execute_async_v3", 7)]
    assert answer.keys() == {"y"}


def test_a_swap_sets_only_the_addresses_of_slots() -> None:
    calls, executions = _calls()
    x, one, other = _x(), calls.hold(tiny.drawn(1)), calls.hold(tiny.drawn(2))
    answers = [calls.call({"x": x}, one)]
    _log(executions)
    answers.append(calls.call({"x": x}, other))
    addresses = [("set_tensor_address", name) for name in "aby"]
    assert _log(executions) == [*addresses, ("execute_async_v3", 7)]
    assert torch.equal(answers[1]["y"], tiny.computed(x, **tiny.drawn(2)))


def test_a_swap_to_another_rank_sets_shapes() -> None:
    calls, executions = _calls()
    x, one, other = _x(), calls.hold(tiny.drawn(1, 1)), calls.hold(tiny.drawn(2, RANK))
    calls.call({"x": x}, one)
    _log(executions)
    assert torch.equal(calls.call({"x": x}, other)["y"], tiny.computed(x, **tiny.drawn(2, RANK)))
    bindings = [(method, name) for name in "ab" for method in ("set_input_shape", "set_tensor_address")]
    assert [*bindings, ("infer_shapes",)] == _log(executions)[:5]


def test_new_shapes_are_counted() -> None:
    """Kernels are compiled for them, which are worth keeping."""
    calls, _ = _calls()
    for rank in (1, 2, 2, 1):
        calls.call({"x": _x()}, calls.hold(tiny.drawn(rank, rank)))
    assert [execution.shape_changes for execution in calls.executions()] == [3]


def test_a_thousand_swaps_leave_no_trace() -> None:
    calls, _ = _calls()
    x, choices = _x(), [calls.hold(tiny.drawn(seed, 1 + seed % RANK)) for seed in range(5)]
    fresh = [_calls()[0].call({"x": x}, slots)["y"] for slots in choices]
    for place in torch.randint(5, (1000,)).tolist():
        assert torch.equal(calls.call({"x": x}, choices[place])["y"], fresh[place])


def test_does_not_confuse_freed_slots() -> None:
    """The memory of an adapter that is gone may be another's by then."""
    calls, _ = _calls()
    x = _x()
    for seed in range(20):
        assert torch.equal(
            calls.call({"x": x}, calls.hold(tiny.drawn(seed)))["y"], tiny.computed(x, **tiny.drawn(seed))
        )


@pytest.mark.parametrize("method", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
@pytest.mark.parametrize("order", [("before", "after"), ("after", "before")])
def test_a_call_that_fails_leaves_the_binding_before(method: str, order: tuple[str, ...]) -> None:
    calls, executions = _calls()
    x, before, after = _x(), calls.hold(tiny.drawn(1, 1)), calls.hold(tiny.drawn(2, RANK))
    found = calls.call({"x": x}, before)["y"]
    (context,) = executions.made
    context.refuses = {method: lambda name, *_: name in {"b", 7}}
    with pytest.raises(lorac.LoracError, match="TensorRT gives no reason"):
        calls.call({"x": x}, after)
    context.refuses = {}
    wanted = {"before": found, "after": tiny.computed(x, **tiny.drawn(2, RANK))}
    for which in order:
        assert torch.equal(calls.call({"x": x}, {"before": before, "after": after}[which])["y"], wanted[which])


def test_a_size_that_the_plan_was_not_built_for() -> None:
    io = tiny.io()
    calls = ContextPool(io, CPU, Lanes(io, {"set_input_shape": lambda name, shape: name == "x" and shape[0] > ROWS}))
    with pytest.raises(lorac.InputMismatch, match=r"does not take 'x' of shape \(6, 6\)"):
        calls.call({"x": _x(ROWS + 1)}, calls.hold(tiny.drawn(1)))


def test_an_input_that_is_missing() -> None:
    calls, _ = _calls()
    with pytest.raises(lorac.InputMismatch, match="the plan reads x, and the call gives no such input"):
        calls.call({}, calls.hold(tiny.drawn(1)))


def test_an_input_that_is_empty_has_an_address() -> None:
    calls, _ = _calls()
    assert calls.call({"x": torch.empty(0, IN)}, calls.hold(tiny.drawn(1)))["y"].shape == (0, OUT)


def test_returns_outputs_of_data_dependent_size() -> None:
    calls, _ = _calls(depends=True)
    answers = []
    for seed in range(3):
        slots, x = tiny.drawn(seed), _x(1 + seed, seed)
        answers.append((calls.call({"x": x}, calls.hold(slots))["y"], tiny.computed(x, **slots)))
    assert all(torch.equal(found, wanted) for found, wanted in answers), "an output's memory is its own"


def test_an_allocator_gives_no_empty_memory() -> None:
    made = engines.allocator()
    assert made.reallocate_output_async("y", 0, 0, 256, 0) != 0
    made.notify_shape("y", (0, 2))
    assert made.output().shape == (0, 2) and made.output().dtype == torch.float16


# --- slots and inputs -------------------------------------------------------------------------------------------------
def test_reads_aligned_slots_without_a_copy() -> None:
    calls, _ = _calls()
    slots = tiny.drawn(1)
    laid_out = calls.hold(slots | {"of another graph": torch.zeros(1)})
    assert {name: tensor.data_ptr() for name, tensor in laid_out.items()} == {n: t.data_ptr() for n, t in slots.items()}


@pytest.mark.parametrize("change", ["misaligned", "strided", "dtype"])
def test_copies_other_slots_once(change: str) -> None:
    calls, _ = _calls()
    a = tiny.drawn(1)["a"]
    given = {"misaligned": tiny.placed(torch.randn(IN * 2 + 1))[1:].view(IN, 2), "strided": tiny.placed(a.mT).mT}
    tensor = given.get(change, a.double())
    one, other = (calls.hold({"a": tensor, "b": tiny.drawn(1)["b"]}) for _ in range(2))
    assert one["a"].data_ptr() == other["a"].data_ptr() != tensor.data_ptr()
    assert torch.equal(one["a"], tensor.float()) and one["a"].is_contiguous() and not one["a"].data_ptr() % 256


class Copier(threading.Thread):
    """Lays out a choice on a stream of its own, which has not copied yet."""

    def __init__(self, calls: ContextPool, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._pool, self._tensors = calls, tensors

    def run(self) -> None:
        self._pool.hold(self._tensors)


def test_a_copy_of_another_thread_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its event is on that thread's stream, and an event of this thread's stream says nothing of it."""
    monkeypatch.setattr(
        device_slots, "record_event", lambda tensors: (threading.current_thread().name,) if list(tensors) else ()
    )
    calls, _ = _calls()
    tensors = {"a": tiny.drawn(1)["a"].double(), "b": tiny.drawn(1)["b"]}
    copier = Copier(calls, tensors)
    copier.start()
    copier.join()
    waited: list[object] = []
    stream = SimpleNamespace(cuda_stream=7, wait_event=waited.append)
    for _ in range(2):
        calls.hold(tensors).wait_on(stream)  # type: ignore[arg-type]
    assert set(waited) == {copier.name, threading.current_thread().name}


def test_an_input_on_the_cpu_goes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU's memory; so the caller need not wait for the GPU."""
    copied: list[tuple[bool, bool]] = []

    def copy(to: Tensor, new: Tensor, non_blocking: bool = False) -> Tensor:
        copied.append((new is pinned, non_blocking))
        return to

    x, pinned = torch.ones(2, IN), torch.ones(2, IN)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    io_tensor, there = IOTensor(torch.float32, (-1, IN)), torch.device("meta")
    for staged in (True, False):
        copy_to_engine(x, io_tensor, there, staged=staged)
    copy_to_engine(x, IOTensor(torch.int64, (2,), on_host=True), there, staged=True)
    copy_to_engine(pinned, io_tensor, there, staged=True)
    assert copied == [(True, True), (False, False), (False, False), (True, False)]


def test_leaves_memory_for_every_context() -> None:
    engine = engines.OfNetwork()
    engine.streamable_weights_size, engine.device_memory_size_v2 = 1000, 100
    engine.get_weight_streaming_automatic_budget = lambda: 900  # type: ignore[method-assign]
    for contexts, budget in ((4, 500), (12, 0)):
        running.set_streaming_budget(engine, contexts)
        assert engine.weight_streaming_budget_v2 == budget


def test_tries_to_store_kernels_only_once(tmp_path: Path) -> None:
    """A call does not fail for that."""
    (tmp_path / "file").write_bytes(b"")
    kernels = SimpleNamespace(serialize=lambda: b"kernels")
    config = SimpleNamespace(create_runtime_cache=lambda: kernels, set_runtime_cache=lambda cache: True)
    engine: Any = SimpleNamespace(create_runtime_config=lambda: config)
    settings = running._RuntimeConfig(engine, PlanCache(tmp_path / "file").kernels("0" * 32), LIBRARY)
    with pytest.warns(lorac.LoracWarning, match="is not used"):
        settings.store(1)
    for shapes in range(2, 9):
        settings.store(shapes)


def test_reads_inputs_in_every_call() -> None:
    """A copy that was made of it is stale once it is written to."""
    calls, _ = _calls()
    slots, x = calls.hold(tiny.drawn(1)), torch.zeros(2, IN, dtype=torch.float64)
    before = calls.call({"x": x}, slots)["y"]
    x += 1
    assert not torch.equal(calls.call({"x": x}, slots)["y"], before)


def test_reads_slots_after_writes_in_place() -> None:
    calls, _ = _calls()
    memory, x = tiny.drawn(1), _x()
    slots = calls.hold(memory, fixed=True)
    calls.call({"x": x}, slots)
    for name, tensor in tiny.drawn(2).items():
        memory[name].copy_(tensor)
    assert torch.equal(calls.call({"x": x}, slots)["y"], tiny.computed(x, **tiny.drawn(2)))


def test_rejects_fixed_slots_that_need_a_copy() -> None:
    calls, _ = _calls()
    with pytest.raises(lorac.Unavailable, match=r"'a' cannot be read where it lies: on cpu, as torch.float64"):
        calls.hold({**tiny.drawn(1), "a": tiny.drawn(1)["a"].double()}, fixed=True)


def test_keeps_inputs_that_set_shapes_on_the_host() -> None:
    io_tensor = IOTensor(torch.int64, (2,), on_host=True)
    assert copy_to_engine(torch.tensor([3, 4], dtype=torch.int32), io_tensor, torch.device("meta")).tolist() == [3, 4]


# --- threads ----------------------------------------------------------------------------------------------------------
def _in_threads(calls: ContextPool, choices: list[DeviceSlots], wanted: list[Tensor], x: Tensor) -> list[int]:
    wrong: list[int] = []

    def work(place: int) -> None:
        for turn in range(50):
            which = (place + turn) % len(choices)
            if not torch.equal(calls.call({"x": x}, choices[which])["y"], wanted[which]):
                wrong.append(which)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


def test_eight_threads_with_choices_of_their_own() -> None:
    """The contexts raise where two calls are in one at a time."""
    calls, executions = _calls()
    x, slots = _x(), [tiny.drawn(seed, 1 + seed % RANK) for seed in range(8)]
    wanted = [tiny.computed(x, **one) for one in slots]
    assert _in_threads(calls, [calls.hold(one) for one in slots], wanted, x) == []
    assert 1 <= len(executions.made) <= running.MAX_CONTEXTS


def test_a_context_that_fails_takes_no_lane() -> None:
    io, left = tiny.io(), [3 * running.MAX_CONTEXTS]
    executions = Lanes(io)

    def execution() -> object:
        left[0] -= 1
        if left[0] >= 0:
            raise lorac.Unavailable("no memory")
        return executions()

    calls = ContextPool(io, CPU, execution)  # type: ignore[arg-type]
    for _ in range(3 * running.MAX_CONTEXTS):
        with pytest.raises(lorac.Unavailable, match="no memory"):
            calls.call({"x": _x()}, calls.hold(tiny.drawn(1)))
    assert torch.equal(calls.call({"x": _x()}, calls.hold(tiny.drawn(1)))["y"], tiny.computed(_x(), **tiny.drawn(1)))


def test_finish_waits_for_queued_calls() -> None:
    calls, executions = _calls()
    calls.call({"x": _x()}, calls.hold(tiny.drawn(1)))
    calls.finish()
    assert [execution.streams.finished for execution in executions.executions] == [1]  # type: ignore[attr-defined]


# --- what an engine says ----------------------------------------------------------------------------------------------
def test_reads_tensors_from_the_engine() -> None:
    assert IOTensors.of(engines.OfNetwork()) == tiny.io()


# --- what is refused --------------------------------------------------------------------------------------------------
@without_cuda
def test_where_torch_has_no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(lorac.Unavailable) as error:
        PlanRunner(tiny.plan())
    assert error.value.what == HERE
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(lorac.Unavailable, match="was built without CUDA"):
        PlanRunner(tiny.plan())


@without_cuda
def test_rejects_a_machine_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(lorac.Unavailable, match="finds none: no driver, or no GPU"):
        PlanRunner(tiny.plan())


def test_rejects_a_device_that_is_not_a_gpu() -> None:
    with pytest.raises(lorac.Unavailable, match="runs on a GPU, not on 'cpu'"):
        PlanRunner(tiny.plan(), "cpu")


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx alone tells without a GPU")
@pytest.mark.parametrize("harm", [lambda _: b"", lambda _: b"no plan" * 100, lambda p: p[:40], lambda p: b"x" + p[1:]])
def test_rejects_bytes_that_are_not_a_plan(harm: Callable[[bytes], bytes]) -> None:
    damage = harm(tiny.plan())
    with pytest.raises(lorac.ArtifactError, match=rf"these {len(damage)} bytes are not a plan of"):
        PlanRunner(damage)


def test_a_plan_of_another_version() -> None:
    made_by = f"{LIBRARY.name} 0.1.2"
    with pytest.raises(
        lorac.ArtifactError, match=rf"made by {made_by}, and {LIBRARY.name_and_version} is installed"
    ) as error:
        PlanRunner(tiny.plan(), made_by=made_by)
    assert f"pip install {LIBRARY.name}==0.1.2" in str(error.value)
    assert requirements.find_maker(LIBRARY.name_and_version) is LIBRARY


def test_a_gpu_that_the_plan_was_not_built_for() -> None:
    with pytest.raises(
        lorac.Unavailable, match=r"H100 has compute capability 9.0, and the plan was built for 8.6, 12.0"
    ):
        requirements.check_capability("9.0", ("8.6", "12.0"), "H100", LIBRARY)
    requirements.check_capability("8.6", ("8.6", "12.0"), "A10", LIBRARY)
    requirements.check_capability("9.0", (), "H100", LIBRARY)


def test_accepts_tensors_over_numpy_arrays() -> None:
    """Whoever calls makes tensors of arrays; one that shares an array's memory is read there."""
    calls, _ = _calls()
    x: Mapping[str, Tensor] = {"x": torch.from_numpy(np.ones((2, IN), np.float32))}
    assert torch.equal(calls.call(x, tiny.drawn(1))["y"], tiny.computed(x["x"], **tiny.drawn(1)))
