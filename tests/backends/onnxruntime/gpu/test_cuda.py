"""ONNX Runtime on CUDA, by the public interface: parity in every precision, swaps, memory, threads, artifacts."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import lorac
from lorac.backends.onnxruntime.devices import widening as kernels_of_cuda
from lorac.backends.onnxruntime.devices.memory import OrtDeviceMemory, TorchDeviceMemory
from lorac.testing import assert_close, assert_parity
from tests.backends.onnxruntime.gpu import needs
from tests.backends.onnxruntime.half_hosts import Reference

pytestmark = needs.marks()
HOSTS = ("tiny_bert", "tiny_llama")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MERGEABLE = ("lora", "dora")


@functools.cache
def reference(host: str, dtype: torch.dtype) -> Reference:
    return Reference(host, dtype)


def compiled(host: str, dtype: torch.dtype = torch.float32, mode: str = "live", **options: Any) -> Any:
    """Return a model on the GPU, with adapters that its mode takes."""
    oracle = reference(host, dtype)
    adapters = {n: a for n, a in oracle.adapters.items() if mode == "live" or n in MERGEABLE}
    given: dict[str, Any] = {"active": None, "device": "cuda", "example_inputs": oracle.inputs(), **options}
    return lorac.compile(oracle.entry.fresh(dtype), adapters, "onnxruntime", mode=mode, **given)


def choices(host: str, mode: str) -> list[Any]:
    """Return choices to swap to: none, each adapter, a mixture."""
    known = reference(host, torch.float32).choices
    taken = [known[name] for name in known if mode == "live" or name in MERGEABLE]
    return [None, *taken, {name: strength / 2 for one in taken for name, strength in one.items()}]


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


def first(host: str, answer: Any) -> Any:
    return answer[reference(host, torch.float32).entry.outputs[0]]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_matches_torch(host: str, dtype: torch.dtype, mode: str) -> None:
    oracle, engine = reference(host, dtype), compiled(host, dtype, mode)
    off = engine(**oracle.inputs())
    for name in engine.adapters:
        engine.swap(oracle.choices[name])
        answer = engine(**oracle.inputs())
        assert first(host, answer).dtype == dtype
        assert_parity(answer, oracle.of(name), oracle.base, own_base=off, names=oracle.entry.outputs)
    engine.swap(None)
    assert torch.equal(first(host, engine(**oracle.inputs())), first(host, off))


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_thousand_swaps_are_a_fresh_compile(mode: str) -> None:
    host, given = "tiny_llama", on_gpu(reference("tiny_llama", torch.float32).inputs())
    fresh = [first(host, compiled(host, mode=mode, active=choice)(**given)) for choice in choices(host, mode)]
    engine = compiled(host, mode=mode)
    for place in torch.randint(len(fresh), (1000,), generator=torch.Generator().manual_seed(0)).tolist():
        engine.swap(choices(host, mode)[place])
        assert torch.equal(first(host, engine(**given)), fresh[place])


def test_a_call_is_answered_where_its_inputs_are() -> None:
    host, oracle = "tiny_bert", reference("tiny_bert", torch.float32)
    engine = compiled(host, active="lora")
    near, there = first(host, engine(**oracle.inputs())), first(host, engine(**on_gpu(oracle.inputs())))
    array = first(host, engine(**{name: value.numpy() for name, value in oracle.inputs().items()}))
    assert near.device.type == "cpu" and there.device == torch.device("cuda:0")
    assert torch.equal(there.cpu(), near) and torch.equal(torch.from_numpy(array), near)


def test_computes_on_the_gpu_and_reports_ops_on_the_cpu() -> None:
    engine = compiled("tiny_llama")
    assert engine.engine.graphs["main"].session.get_providers()[0] == "CUDAExecutionProvider"
    assert isinstance(engine.engine.where, TorchDeviceMemory)
    said = [note for note in engine.engine.interfaces["main"].notes if note.startswith("the CPU computes")]
    assert not any("MatMul" in note for note in said) and all(note in str(engine.explain()) for note in said)


def _copies(events: Any) -> Iterator[str]:
    return (event.name for event in events if "Memcpy" in event.name)


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_swap_copies_nothing_to_the_host(mode: str) -> None:
    host = "tiny_llama"
    given, engine = on_gpu(reference(host, torch.float32).inputs()), compiled(host, mode=mode)
    for choice in (*choices(host, mode), *choices(host, mode)):
        engine.swap(choice)
        engine(**given)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        for choice in choices(host, mode):
            engine.swap(choice)
        torch.cuda.synchronize()
    copies = list(_copies(profiled.events()))
    assert not [copy for copy in copies if "DtoH" in copy]
    assert mode == "fused" or not copies


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_weights_and_slots_lie_on_the_gpu(mode: str) -> None:
    engine = compiled("tiny_bert", mode=mode)
    engine.swap("lora")
    assert all(tensor.is_cuda for tensor in engine.engine.memory.values()) and bool(engine.engine.memory) == (
        mode == "fused"
    )
    values = engine.engine.written_program.values if mode == "fused" else engine.switch.state.bound.values
    assert values and {value.device_name() for value in values.values()} <= {"cuda", "gpu"}


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_returns_the_same_bits_without_torchs_cuda(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory of ONNX Runtime's own, which is written from the CPU."""
    host, oracle = "tiny_bert", reference("tiny_bert", torch.float32)
    plain = compiled(host, mode="live")
    monkeypatch.setattr("lorac.backends.onnxruntime.engine.memory_at", OrtDeviceMemory)
    engine = compiled(host, mode=mode)
    for choice in choices(host, mode):
        engine.swap(choice)
        plain.swap(choice)
        found, wanted = (first(host, one(**oracle.inputs())) for one in (engine, plain))
        assert torch.equal(found, wanted) if mode == "live" else assert_close(found, wanted) is None


def test_each_thread_gets_its_own_choice() -> None:
    host, given = "tiny_llama", on_gpu(reference("tiny_llama", torch.float32).inputs())
    engine, listed = compiled(host), choices(host, "live")
    alone = [first(host, engine(**given, adapters=choice)) for choice in listed]

    def ask(place: int) -> bool:
        torch.cuda.set_device(0)
        with torch.cuda.stream(torch.cuda.Stream()):
            mine = {name: value.clone() for name, value in given.items()}
            return torch.equal(first(host, engine(**mine, adapters=listed[place])), alone[place])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, [place % len(listed) for place in range(200)]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_loaded_artifact_runs_on_the_gpu(dtype: torch.dtype, tmp_path: Path) -> None:
    host, oracle = "tiny_bert", reference("tiny_bert", dtype)
    engine = compiled(host, dtype)
    engine.save(tmp_path / "it")
    loaded: Any = lorac.load(tmp_path / "it")
    for choice in choices(host, "live"):
        engine.swap(choice)
        loaded.swap(choice)
        assert torch.equal(first(host, loaded(**oracle.inputs())), first(host, engine(**oracle.inputs())))
    if dtype == torch.float32:
        assert_close(
            first(host, lorac.load(tmp_path / "it", device="cpu")(**oracle.inputs(), adapters=None)),
            first(host, oracle.base),
        )
    else:
        with pytest.raises(lorac.Unavailable, match="does not compute on the CPU"):
            lorac.load(tmp_path / "it", device="cpu")


def test_a_model_on_the_gpu_runs_there_by_default() -> None:
    oracle = reference("tiny_bert", torch.float32)
    model = oracle.entry.fresh().cuda()
    engine: Any = lorac.compile(model, oracle.adapters, "onnxruntime", on_gpu(oracle.inputs()), active=None)
    assert engine.engine.options.place.type == "cuda" and next(model.parameters()).is_cuda
    assert_close(first("tiny_bert", engine(**oracle.inputs())), first("tiny_bert", oracle.base))


def test_names_a_missing_gpu() -> None:
    with pytest.raises(
        lorac.Unavailable, match=f"there is no device 'cuda:99': NVIDIA's driver shows {torch.cuda.device_count()}"
    ):
        compiled("tiny_bert", device="cuda:99")


_LIST = """
from onnxruntime.capi import _pybind_state as library
kinds = {"float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}
for kernel in library.get_all_opkernel_def():
    opset = 1 if kernel.domain else 20
    if kernel.provider == "CUDAExecutionProvider" and kernel.version_range[0] <= opset <= kernel.version_range[1]:
        types = {kind for kinds in kernel.type_constraints.values() for kind in kinds}
        print(*(f"{dtype}|{kernel.domain}|{kernel.op_name}" for dtype, kind in kinds.items() if kind in types))
"""


def test_the_list_of_kernels_equals_the_librarys() -> None:
    done = subprocess.run([sys.executable, "-c", _LIST], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("onnxruntime cannot list its kernels here: a provider of it cannot be loaded")
    listed = set(done.stdout.split())
    claimed = {
        f"{dtype}|{domain}|{op}" for dtype, ops in kernels_of_cuda.HALF_PRECISION_OPS.items() for domain, op in ops
    }
    assert claimed <= listed
