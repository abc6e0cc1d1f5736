"""A plan of one layer on a GPU: every step between torch and TensorRT, by itself."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import lorac
from lorac.backends.tensorrt.library import capability_of
from lorac.backends.tensorrt.plan_cache import PlanCache
from lorac.backends.tensorrt.plan_runner import PlanRunner
from lorac.backends.tensorrt.refitting import WeightRefitter
from lorac.testing import assert_close
from tests.backends.tensorrt import tiny
from tests.backends.tensorrt.gpu import needs
from tests.backends.tensorrt.tiny import BIAS, IN, LIBRARY, RANK, ROWS, WEIGHT

pytestmark = needs.needing(needs.lacking_for_tensorrt())
Tensor = torch.Tensor


def _here() -> list[str]:
    """Return the GPU's capability, where the library takes capabilities."""
    return [f"SM{capability_of(torch.device('cuda')).replace('.', '')}"] if LIBRARY.is_rtx else []


def _plan(*flags: str, refittable: tuple[str, ...] = ()) -> bytes:
    return tiny.built(_here(), flags, refittable)


def _x(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed)).cuda()


def _on_gpu(slots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cuda() for name, tensor in slots.items()}


def _wanted(x: Tensor, seed: int, rank: int = 2) -> Tensor:
    return tiny.computed(x.cpu(), **tiny.drawn(seed, rank))


def test_values_at_every_rank_and_size() -> None:
    running = PlanRunner(_plan())
    for rows in range(1, ROWS + 1):
        for rank in range(1, RANK + 1):
            found = running.call({"x": _x(rows, rows)}, running.hold(_on_gpu(tiny.drawn(rank, rank))))["y"]
            assert found.is_cuda
            assert_close(found.cpu(), _wanted(_x(rows, rows), rank, rank))


def test_returns_cpu_outputs_for_cpu_inputs() -> None:
    running = PlanRunner(_plan())
    found = running.call({"x": _x().cpu()}, tiny.drawn(1))["y"]
    assert found.device.type == "cpu"
    assert_close(found, _wanted(_x(), 1))


def test_ports_are_the_networks() -> None:
    assert PlanRunner(_plan()).io == tiny.io()


def test_a_thousand_swaps_leave_no_trace() -> None:
    running, x = PlanRunner(_plan()), _x()
    choices = [running.hold(_on_gpu(tiny.drawn(seed, 1 + seed % RANK))) for seed in range(5)]
    first = [running.call({"x": x}, slots)["y"].clone() for slots in choices]
    for place in torch.randint(5, (1000,)).tolist():
        assert torch.equal(running.call({"x": x}, choices[place])["y"], first[place])


def test_a_swap_copies_nothing() -> None:
    running, x = PlanRunner(_plan()), _x()
    choices = [running.hold(_on_gpu(tiny.drawn(seed))) for seed in range(2)]
    answers = [running.call({"x": x}, slots) for slots in choices]
    before = torch.cuda.memory_allocated()
    answers[0] = running.call({"x": x}, choices[1])
    assert torch.cuda.memory_allocated() == before, "the answer took the place of the one before, and nothing else came"


def test_keeps_freed_memory_until_it_is_read() -> None:
    running = PlanRunner(_plan())
    found = []
    for seed in range(200):
        found.append(running.call({"x": _x(seed=seed)}, running.hold(_on_gpu(tiny.drawn(seed))))["y"])
        torch.full((ROWS * IN,), float("nan"), device="cuda")  # takes the place of what was let go
    for seed, y in enumerate(found):
        assert_close(y.cpu(), _wanted(_x(seed=seed), seed))


@pytest.mark.parametrize("own_stream", [False, True])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_eight_threads(own_stream: bool, cuda_graphs: bool) -> None:
    flags = ["REQUIRE_USER_ALLOCATION"] if cuda_graphs and LIBRARY.is_rtx else []
    running = PlanRunner(_plan(*flags), cuda_graphs=cuda_graphs)
    x = _x()
    choices = [running.hold(_on_gpu(tiny.drawn(seed, 1 + seed % RANK))) for seed in range(8)]
    first = [running.call({"x": x}, slots)["y"].cpu() for slots in choices]
    wrong: list[int] = []

    def work(place: int) -> None:
        stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
        with torch.cuda.stream(stream):
            for turn in range(100):
                which = (place + turn) % len(choices)
                if not torch.equal(running.call({"x": x}, choices[which])["y"].cpu(), first[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_cuda_graph_answers_the_same() -> None:
    """A plan that could not be captured would warn, and a warning is an error."""
    flags = ["REQUIRE_USER_ALLOCATION"] if LIBRARY.is_rtx else []
    plan = _plan(*flags)
    plain, captured = PlanRunner(plan), PlanRunner(plan, cuda_graphs=True)
    for rows, seed in ((1, 0), (2, 1), (1, 2), (2, 3)):
        slots, x = _on_gpu(tiny.drawn(seed)), _x(rows, seed)
        found = [one.call({"x": x}, one.hold(slots))["y"] for one in (plain, captured, captured)]
        assert torch.equal(found[0], found[1]) and torch.equal(found[1], found[2])


def test_reads_slots_after_writes_in_place() -> None:
    for cuda_graphs in (False, True):
        flags = ["REQUIRE_USER_ALLOCATION"] if LIBRARY.is_rtx else []
        running, memory, x = PlanRunner(_plan(*flags), cuda_graphs=cuda_graphs), _on_gpu(tiny.drawn(1)), _x()
        slots = running.hold(memory, fixed=True)
        running.call({"x": x}, slots)
        with running.writing():
            for name, tensor in tiny.drawn(2).items():
                memory[name].copy_(tensor)
        assert_close(running.call({"x": x}, slots)["y"].cpu(), _wanted(x, 2))


def test_a_copy_of_another_threads_stream_is_waited_for() -> None:
    running, x = PlanRunner(_plan()), _x()
    slots = {name: tensor.double() for name, tensor in _on_gpu(tiny.drawn(1)).items()}
    stream = torch.cuda.Stream()

    def lay_out() -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            running.hold(slots)

    thread = threading.Thread(target=lay_out)
    thread.start()
    thread.join()
    assert_close(running.call({"x": x}, running.hold(slots))["y"].cpu(), _wanted(x, 1))


def test_an_input_on_the_cpu_may_be_written_to_after_its_call() -> None:
    running, slots = PlanRunner(_plan()), _on_gpu(tiny.drawn(1))
    choices, x = running.hold(slots), _x().cpu()
    given = x.clone()
    torch.cuda._sleep(200_000_000)
    found = running.call({"x": given, "unused": torch.zeros(1, device="cuda")}, choices)["y"]
    given.zero_()
    assert_close(found.cpu(), _wanted(x, 1))


def test_sizes_that_the_plan_was_not_built_for() -> None:
    running = PlanRunner(_plan())
    slots = running.hold(_on_gpu(tiny.drawn(1)))
    before = running.call({"x": _x()}, slots)["y"]
    with pytest.raises(lorac.InputMismatch, match=rf"'x' of shape \({ROWS + 1}, {IN}\)"):
        running.call({"x": _x(ROWS + 1)}, slots)
    with pytest.raises(lorac.InputMismatch, match="'a' of shape"):
        running.call({"x": _x()}, running.hold(_on_gpu(tiny.drawn(1, RANK + 1))))
    assert torch.equal(running.call({"x": _x()}, slots)["y"], before)


def test_a_plan_that_is_damaged_where_its_header_is_not() -> None:
    plan = bytearray(_plan())
    plan[len(plan) // 3 :] = bytes(len(plan) - len(plan) // 3)
    with pytest.raises(lorac.ArtifactError, match="does not load the plan"):
        PlanRunner(bytes(plan))


def test_another_capability_is_named() -> None:
    with pytest.raises(lorac.Unavailable, match=r"and the plan was built for 5\.0"):
        PlanRunner(_plan(), capabilities=["5.0"])


def test_keeps_kernels_between_plans(tmp_path: Path) -> None:
    if not LIBRARY.is_rtx:
        pytest.skip("TensorRT for RTX alone compiles kernels where a plan is loaded")
    kernels = PlanCache(tmp_path).kernels("0" * 32)
    x, slots = _x(), _on_gpu(tiny.drawn(1))
    plan = _plan()
    first = PlanRunner(plan, kernels=kernels).call({"x": x}, slots)["y"]
    assert kernels.read()
    assert torch.equal(PlanRunner(plan, kernels=kernels).call({"x": x}, slots)["y"], first)


# --- weights that are replaced ----------------------------------------------------------------------------------------
def test_a_refittable_plan_matches_a_plain_one() -> None:
    """One release dropped a product's bias from such plans in silence, though nothing was replaced yet."""
    x, slots = _x(), _on_gpu(tiny.drawn(1))
    plain, fresh = (PlanRunner(_plan(refittable=marked)).call({"x": x}, slots)["y"] for marked in ((), (WEIGHT,)))
    assert_close(fresh.cpu(), plain.cpu())
    assert_close(fresh.cpu(), _wanted(x, 1))


@pytest.mark.parametrize("marked", [(WEIGHT,), (BIAS,), (WEIGHT, BIAS)])
def test_weights_are_replaced_from_the_gpus_memory_and_come_back(marked: tuple[str, ...]) -> None:
    running, x = PlanRunner(_plan(refittable=marked)), _x()
    slots = running.hold(_on_gpu(tiny.drawn(1)))
    base = tiny.weights()
    memory = {name: base[name].cuda() for name in (WEIGHT, BIAS)}
    refits = WeightRefitter(running.engine, {name: memory[name] for name in marked}, running.library)
    before = running.call({"x": x}, slots)["y"].clone()
    for name in (*marked, None):
        changed = {key: tensor + 1 if key == name else tensor for key, tensor in base.items()}
        with running.writing():
            for key in marked:
                memory[key].copy_(changed[key])
            refits.write([name] if name is not None else [])
        pair = tiny.drawn(1)
        wanted = x.cpu() @ changed[WEIGHT] + changed[BIAS] + (x.cpu() @ pair["a"]) @ pair["b"]
        assert_close(running.call({"x": x}, slots)["y"].cpu(), wanted)
    assert torch.equal(running.call({"x": x}, slots)["y"], before)
