"""Whole models on a GPU, by the public interface: outputs after any swaps, from any thread."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.backends.tensorrt.plan_cache import PLAN, PlanCache
from lorac.testing import assert_close, assert_parity
from tests.backends.tensorrt.gpu import hosts, needs
from tests.backends.tensorrt.gpu.hosts import CHOICES, ONE, OTHER, compiled, first, inputs
from tests.zoo import ZOO

pytestmark = [*needs.needing(needs.lacking_for_tensorrt()), pytest.mark.filterwarnings("ignore::FutureWarning")]
HOSTS = ["tiny_bert", "tiny_llama"]
Tensor = torch.Tensor


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
@torch.no_grad()
def test_matches_eager(host: str, mode: str) -> None:
    names, given = ZOO[host].outputs, inputs(host)
    base = ZOO[host].model()(**given)
    unswapped = compiled(host, "baked", None)(**given)
    eager = lorac.compile(ZOO[host].model(), hosts.adapters(host))
    swapped = None if mode == "baked" else compiled(host, mode)
    for choice in CHOICES[1:]:
        found = compiled(host, mode, choice) if swapped is None else swapped
        if swapped is not None:
            found.swap(choice)
        assert_parity(found(**given), eager(**given, adapters=choice), base, own_base=unswapped, names=names)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_matches_the_base_without_adapters(host: str, mode: str) -> None:
    engine, given = compiled(host, mode, ONE), inputs(host)
    engine.swap(None)
    off = first(host, engine(**given))
    assert_close(off, first(host, ZOO[host].model()(**given)))
    engine.swap(OTHER)
    engine.swap(None)
    assert torch.equal(first(host, engine(**given)), off)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_thousand_swaps_are_a_fresh_compile(host: str, mode: str, cuda_graphs: bool, tmp_path: Path) -> None:
    """With the same plan: two builds by TensorRT may time, and so choose, other kernels."""
    options: dict[str, Any] = {"plan_cache": str(tmp_path), "cuda_graphs": cuda_graphs}
    engine, given = compiled(host, mode, **options), inputs(host, device="cuda")
    fresh = [first(host, compiled(host, mode, choice, **options)(**given)) for choice in CHOICES]
    for place in torch.randint(len(CHOICES), (1000,)).tolist():
        engine.swap(CHOICES[place])
        assert torch.equal(first(host, engine(**given)), fresh[place])


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_eight_threads_with_choices_of_their_own(host: str, cuda_graphs: bool) -> None:
    engine, given = compiled(host, "live", cuda_graphs=cuda_graphs), inputs(host, device="cuda")
    wanted = [first(host, engine(**given, adapters=choice)) for choice in CHOICES]
    wrong: list[int] = []

    def work(place: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(50):
                which = (place + turn) % len(CHOICES)
                if not torch.equal(first(host, engine(**given, adapters=CHOICES[which])), wanted[which]):
                    wrong.append(which)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
def test_cuda_graphs_answer_the_same(host: str, mode: str) -> None:
    """A plan that could not be captured would warn, and a warning is an error."""
    plain, captured = (compiled(host, mode, ONE, cuda_graphs=graphs) for graphs in (False, True))
    for seed in range(3):
        given = inputs(host, seed, "cuda")
        found = first(host, captured(**given))
        assert_close(found, first(host, plain(**given)))
        assert torch.equal(first(host, captured(**given)), found)


@pytest.mark.parametrize("host", HOSTS)
def test_returns_arrays_and_devices_of_the_inputs(host: str) -> None:
    engine, given = compiled(host, "live", ONE), inputs(host)
    on_cpu = first(host, engine(**given))
    on_gpu = first(host, engine(**{name: tensor.cuda() for name, tensor in given.items()}))
    array = engine(**{name: tensor.numpy() for name, tensor in given.items()})[ZOO[host].outputs[0]]
    assert on_cpu.device.type == "cpu" and on_gpu.is_cuda
    assert torch.equal(on_gpu.cpu(), on_cpu) and torch.equal(torch.from_numpy(array), on_cpu)


def test_a_write_before_the_first_call_has_ended_by_then(tmp_path: Path) -> None:
    """The first call loads the plan, on a stream that knows nothing of the stream of the write."""
    host, given = "tiny_bert", inputs("tiny_bert", device="cuda")
    engine = compiled(host, "fused", plan_cache=str(tmp_path))
    wanted = first(host, compiled(host, "fused", ONE, plan_cache=str(tmp_path))(**given))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        engine.swap(ONE)
    assert torch.equal(first(host, engine(**given)), wanted)


# --- weights that are replaced ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", HOSTS)
def test_replaced_weights_keep_nothing_of_the_previous_choice(host: str) -> None:
    """Each adapter is on layers that the other leaves alone."""
    engine, given = compiled(host, "fused", refit=True), inputs(host, device="cuda")
    base = first(host, engine(**given))
    assert_close(base.cpu(), first(host, compiled(host, "fused")(**inputs(host))))
    found = {}
    for name in (ONE, OTHER):
        fresh = compiled(host, "fused", name, refit=True)
        found[name] = first(host, fresh(**given))
        assert_close(found[name].cpu(), first(host, compiled(host, "fused", name)(**inputs(host))))
    for name in (ONE, OTHER, ONE):
        engine.swap(name)
        assert_close(first(host, engine(**given)).cpu(), found[name].cpu())
    engine.swap(None)
    assert torch.equal(first(host, engine(**given)), base)


# --- what was built before --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["live", "fused", "baked"])
def test_reads_a_plan_from_the_cache(mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, given, written = "tiny_bert", inputs("tiny_bert"), []
    real = PlanCache.write

    def write(cache: PlanCache, key: str, content: bytes, kind: str = PLAN) -> None:
        written.append(kind)
        real(cache, key, content, kind)

    monkeypatch.setattr(PlanCache, "write", write)
    one = first(host, compiled(host, mode, ONE, plan_cache=str(tmp_path))(**given))
    assert PLAN in written
    written.clear()
    other = first(host, compiled(host, mode, ONE, plan_cache=str(tmp_path))(**given))
    assert PLAN not in written
    assert torch.equal(one, other)


def test_an_artifact_runs_without_the_model(tmp_path: Path) -> None:
    host, given = "tiny_bert", inputs("tiny_bert")
    engine = compiled(host, "live", ONE)
    wanted = first(host, engine(**given))
    engine.save(tmp_path / "saved")
    loaded = lorac.load(tmp_path / "saved", device="cuda")
    assert torch.equal(first(host, loaded(**given)), wanted)
    loaded.swap(OTHER)
    engine.swap(OTHER)
    assert torch.equal(first(host, loaded(**given)), first(host, engine(**given)))
