"""CUDA graphs of a plan: one for each set of shapes, with buffers for inputs and slots."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import lorac
from lorac.backends.tensorrt.device import cuda_graphs as capturing
from lorac.backends.tensorrt.device.cuda_graphs import CudaGraphCache, QueueWork
from lorac.backends.tensorrt.device.device_slots import DeviceSlots
from lorac.backends.tensorrt.device.interfaces import IOTensor, IOTensors
from lorac.backends.tensorrt.plan_runner import ContextPool
from tests.backends.tensorrt import tiny
from tests.backends.tensorrt.tiny import CPU, IN, RANK, Lanes

Tensor = torch.Tensor


class Recorded:
    """Replaces CUDA: captured work is replayed by doing it again."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0
        self.fails: Exception | None = None

    def __call__(self, work: QueueWork) -> Callable[[], None]:
        if self.fails is not None:
            raise self.fails
        self.captured += 1

        def replay() -> None:
            self.replayed += 1
            work(7)

        return replay


def _calls(*, depends: bool = False) -> tuple[ContextPool, Lanes, Recorded]:
    io, recorded = tiny.io(sizes_depend_on_values=depends), Recorded()
    executions = Lanes(io)
    return ContextPool(io, CPU, executions, CudaGraphCache(io, executions, recorded)), executions, recorded


def _x(rows: int = 2, seed: int = 0) -> Tensor:
    return tiny.placed(torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed)))


def test_captures_one_graph_per_set_of_shapes() -> None:
    calls, executions, recorded = _calls()
    for rows, rank in ((1, 1), (2, 1), (1, RANK), (2, 1), (1, 1)):
        slots, x = tiny.drawn(rows, rank), _x(rows)
        assert torch.equal(calls.call({"x": x}, calls.hold(slots))["y"], tiny.computed(x, **slots))
    assert (recorded.captured, recorded.replayed, len(executions.made)) == (3, 5, 3)


def test_an_answer_is_not_written_over_by_the_next_call() -> None:
    calls, _, _ = _calls()
    slots = calls.hold(tiny.drawn(1))
    first = calls.call({"x": _x(seed=1)}, slots)["y"]
    calls.call({"x": _x(seed=2)}, slots)
    assert torch.equal(first, tiny.computed(_x(seed=1), **tiny.drawn(1)))


def test_copies_slots_only_at_a_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, executions, _ = _calls()
    one, other, x = calls.hold(tiny.drawn(1)), calls.hold(tiny.drawn(2)), _x()
    calls.call({"x": x}, one)
    copied: list[tuple[int, ...]] = []
    real = torch.Tensor.copy_

    def copy(to: Tensor, new: Tensor) -> Tensor:
        copied.append(tuple(new.shape))
        return real(to, new)

    monkeypatch.setattr(torch.Tensor, "copy_", copy)
    calls.call({"x": x}, one)
    assert copied == [tuple(x.shape)]
    found = calls.call({"x": x}, other)["y"]
    assert copied[1:] == [tuple(x.shape), *(tuple(tensor.shape) for tensor in other.values())]
    assert torch.equal(found, tiny.computed(x, **tiny.drawn(2)))
    assert ("set_tensor_address", "a") in executions.made[0].calls
    executions.made[0].calls.clear()
    calls.call({"x": x}, one)
    assert executions.made[0].calls == [("execute_async_v3", 7)], "what was captured stays where it is"


def test_a_thousand_swaps_leave_no_trace() -> None:
    calls, _, recorded = _calls()
    x, choices = _x(), [calls.hold(tiny.drawn(seed, 1 + seed % RANK)) for seed in range(5)]
    fresh = [_calls()[0].call({"x": x}, slots)["y"] for slots in choices]
    for place in torch.randint(5, (1000,)).tolist():
        assert torch.equal(calls.call({"x": x}, choices[place])["y"], fresh[place])
    assert recorded.captured == RANK


def test_replays_read_slots_written_in_place() -> None:
    calls, _, recorded = _calls()
    memory, x = tiny.drawn(1), _x()
    slots = calls.hold(memory, fixed=True)
    calls.call({"x": x}, slots)
    for name, tensor in tiny.drawn(2).items():
        memory[name].copy_(tensor)
    assert torch.equal(calls.call({"x": x}, slots)["y"], tiny.computed(x, **tiny.drawn(2)))
    other = calls.hold(tiny.drawn(3), fixed=True)
    assert torch.equal(calls.call({"x": x}, other)["y"], tiny.computed(x, **tiny.drawn(3)))
    assert recorded.captured == 2, "another memory is another graph"


def _why_not(calls: ContextPool, executions: Lanes, recorded: Recorded, why: str) -> None:
    executions.capturable = why != "it allocates while it runs"
    recorded.fails = RuntimeError(why) if why.startswith("operation") else None
    x, choices = _x(), [calls.hold(tiny.drawn(seed)) for seed in (1, 2)]
    with pytest.warns(lorac.LoracWarning, match=why) as caught:
        found = [calls.call({"x": x}, slots)["y"] for slots in (*choices, *choices)]
    assert len(caught) == 1
    wanted = [tiny.computed(x, **tiny.drawn(seed)) for seed in (1, 2)]
    assert all(torch.equal(one, other) for one, other in zip(found, 2 * wanted, strict=True))


@pytest.mark.parametrize("why", ["operation not permitted when stream is capturing", "it allocates while it runs"])
def test_runs_without_a_graph_and_warns_once(why: str) -> None:
    _why_not(*_calls(), why)


def test_neither_can_sizes_that_depend_on_values() -> None:
    _why_not(*_calls(depends=True), "sizes of its outputs depend on values")


def test_keeps_graphs_after_a_call_outside_the_profile() -> None:
    calls, executions, recorded = _calls()
    executions.refuses["set_input_shape"] = lambda name, shape: name == "x" and shape[0] > 2
    with pytest.raises(lorac.InputMismatch):
        calls.call({"x": _x(3)}, calls.hold(tiny.drawn(1)))
    calls.call({"x": _x()}, calls.hold(tiny.drawn(1)))
    assert recorded.captured == 1


def test_keys_include_host_inputs_that_set_shapes() -> None:
    io = IOTensors({"sizes": IOTensor(torch.int64, (2,), on_host=True)}, {})
    graphs = CudaGraphCache(io, Lanes(io), Recorded())
    keys = {graphs._key({"sizes": torch.tensor(numbers)}, DeviceSlots({})) for numbers in ([2, 3], [3, 2], [2, 3])}
    assert len(keys) == 2


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no memory"), RuntimeError("CUDA error: out of memory"), lorac.Unavailable("full")]
)
def test_a_lack_of_memory_passes(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call runs without a graph, and some calls later one is captured."""
    monkeypatch.setattr(capturing, "RETRY_CALLS", 10)
    calls, _, recorded = _calls()
    recorded.fails = error
    slots, x = calls.hold(tiny.drawn(1)), _x()
    with pytest.warns(lorac.LoracWarning, match="no memory for another CUDA graph"):
        found = [calls.call({"x": x}, slots)["y"]]
    recorded.fails = None
    found += [calls.call({"x": x}, slots)["y"] for _ in range(20)]
    assert recorded.captured == 1 and 5 < recorded.replayed < 15
    assert all(torch.equal(one, found[0]) for one in found)


def test_more_sets_of_sizes_than_fit_do_not_capture_each_time() -> None:
    calls, executions, recorded = _calls()
    slots = calls.hold(tiny.drawn(1))
    for _ in range(5):
        for rows in range(1, capturing.MAX_GRAPHS + 3):
            x = _x(rows)
            assert torch.equal(calls.call({"x": x}, slots)["y"], tiny.computed(x, **tiny.drawn(1)))
    assert recorded.captured == capturing.MAX_GRAPHS
    assert len(executions.made) == capturing.MAX_GRAPHS + 1, "the others share the contexts of calls without a graph"


def test_evicts_the_least_recently_used_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "IDLE_CALLS", 1)
    calls, executions, recorded = _calls()
    slots = calls.hold(tiny.drawn(1))
    for rows in range(1, capturing.MAX_GRAPHS + 2):
        calls.call({"x": _x(rows)}, slots)
        calls.call({"x": _x(1)}, slots)
    assert [execution.streams.finished for execution in executions.executions] == [0, 1] + [0] * (
        capturing.MAX_GRAPHS - 1
    )  # type: ignore[attr-defined]
    calls.call({"x": _x(1)}, slots)
    assert recorded.captured == capturing.MAX_GRAPHS + 1
    calls.call({"x": _x(2)}, slots)
    assert recorded.captured == capturing.MAX_GRAPHS + 2


def test_who_writes_waits_for_graphs_too() -> None:
    calls, executions, _ = _calls()
    calls.call({"x": _x()}, calls.hold(tiny.drawn(1)))
    calls.finish()
    assert [execution.streams.finished for execution in executions.executions] == [1]  # type: ignore[attr-defined]


def test_does_not_confuse_freed_slots() -> None:
    calls, _, _ = _calls()
    x = _x()
    for seed in range(20):
        slots: DeviceSlots = calls.hold(tiny.drawn(seed))
        assert torch.equal(calls.call({"x": x}, slots)["y"], tiny.computed(x, **tiny.drawn(seed)))
