"""Devices and providers: options run, or the error names the missing part before anything is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

import lorac
from lorac.backends.onnxruntime.devices import providers
from lorac.backends.onnxruntime.options import OnnxRuntimeOptions
from tests.refusing import refuses

GPU_LIBRARY = os.environ.get("ONNXRUNTIME_GPU_LIBRARY")
RTX_LIBRARY = os.environ.get("ONNXRUNTIME_RTX_LIBRARY")
NO_GPU_LIBRARY = "ONNXRUNTIME_GPU_LIBRARY names no folder with onnxruntime-gpu in it"
NO_RTX_LIBRARY = "ONNXRUNTIME_RTX_LIBRARY names no folder with onnxruntime-ep-nv-tensorrt-rtx-cu13 in it"
CUDA, CPU = providers.CUDA, providers.CPU
built_for_cpu = pytest.mark.skipif(CUDA in ort.get_available_providers(), reason="this ONNX Runtime has CUDA")


class Net(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, 10)."""
        return torch.tanh(self.up(x))


def compiled(**options: Any) -> lorac.Compiled:
    """Return a compiled layer with a LoRA."""
    example = (torch.ones(3, 6),)
    return lorac.compile(Net(), {"a": lorac.LoRA(r=2, targets=["up"])}, "onnxruntime", example, **options)


# What runs where


@pytest.mark.parametrize(
    ("options", "place", "chosen"),
    [
        ({}, "cpu", (CPU,)),
        ({"device": "cpu"}, "cpu", (CPU,)),
        ({"device": "cuda"}, "cuda", (CUDA, CPU)),
        ({"device": "cuda:1"}, "cuda:1", (CUDA, CPU)),
        ({"providers": (CUDA,)}, "cuda", (CUDA, CPU)),
        ({"providers": [CUDA, CPU], "device": "cuda:1"}, "cuda:1", (CUDA, CPU)),
        ({"providers": (providers.RTX, CUDA)}, "cuda", (providers.RTX, CUDA, CPU)),
        ({"providers": ("XnnpackExecutionProvider",)}, "cpu", ("XnnpackExecutionProvider", CPU)),
    ],
)
def test_derives_providers_and_device_from_each_other(options: Any, place: str, chosen: tuple[str, ...]) -> None:
    parsed = OnnxRuntimeOptions(**options)
    assert parsed.place == torch.device(place) and parsed.chosen == chosen


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "cuda", "providers": (CPU,)}, "contradict each other: CPUExecutionProvider runs on 'cpu'"),
        ({"device": "cpu", "providers": (CUDA, CPU)}, "contradict each other: CUDAExecutionProvider runs on 'cuda'"),
        ({"device": "mps"}, "does not run on 'mps'"),
        (
            {"providers": ("CUDAExecutionProvder",)},
            r"no provider 'CUDAExecutionProvder'\n  nearest: CUDAExecutionProvider",
        ),
        ({"providers": ()}, "providers= is empty"),
    ],
)
def test_rejects_contradictory_options(options: Any, said: str) -> None:
    with pytest.raises(lorac.OptionError, match=said):
        compiled(**options)


@built_for_cpu
def test_cuda_that_this_library_lacks_is_named_before_anything_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorac.session.lowering.lower.capture_graph", None)
    for options in (
        {"device": "cuda"},
        {"device": "cuda:9"},
        {"providers": (CUDA,)},
        {"device": "cuda", "dtype": "float16"},
    ):
        with pytest.raises(lorac.Unavailable, match="installed has no CUDAExecutionProvider: it is built for the CPU"):
            compiled(**options)


@built_for_cpu
def test_loading_raises_the_same_errors(tmp_path: Path) -> None:
    compiled().save(tmp_path / "it")
    with pytest.raises(lorac.Unavailable, match="has no CUDAExecutionProvider"):
        lorac.load(tmp_path / "it", device="cuda")
    with pytest.raises(lorac.OptionError, match="device='gpu' cannot be used here"):
        lorac.load(tmp_path / "it", device="gpu")
    assert lorac.load(tmp_path / "it", device="cpu")(np.ones((2, 6), np.float32)).shape == (2, 10)
    eager = lorac.compile(Net(), {"a": lorac.LoRA(r=2)}, example_inputs=(torch.ones(3, 6),))
    eager.save(tmp_path / "eager")
    with pytest.raises(lorac.Unavailable, match="has no CUDAExecutionProvider"):
        lorac.load(tmp_path / "eager", target="onnxruntime", device="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(lorac.OptionError, match="device='cuda' cannot be used here"):
            lorac.load(tmp_path / "eager", device="cuda")


def test_a_cache_is_kept_on_the_cpu_alone() -> None:
    with pytest.raises(lorac.Unavailable, match="keep a cache do not run on 'cuda' yet"):
        compiled(device="cuda", cache=True)


def test_rejects_a_cache_with_an_older_release(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's packages for GPUs are published later than those for the CPU."""
    monkeypatch.setattr(ort, "__version__", "1.31.1")
    with refuses("unavailable", match="needs onnxruntime ≥ 1.32, found 1.31.1"):
        compiled(cache=True)


def test_warns_of_half_precision_on_the_cpu_and_computes_in_float32() -> None:
    with pytest.warns(
        lorac.LoracWarning, match="no kernels for float16: it computes in float32, and its outputs are in float32"
    ):
        half = compiled(dtype="float16", device="cpu")
    assert half(torch.ones(2, 6)).dtype == torch.float32


# The libraries themselves

_ASK = """
import sys, warnings
from tests.backends.onnxruntime.test_providers import compiled
try:
    print(type(compiled(**eval(sys.argv[1]))).__name__)
except Exception as error:
    print(type(error).__name__, error)
"""


_START = """
import onnxruntime, torch
from lorac.backends.onnxruntime.devices import providers
from tests.backends.onnxruntime.test_providers import compiled
model = compiled().engine.files["model.onnx"].read()
chosen, place = (providers.CUDA, providers.CPU), torch.device("cuda")
try:
    print(*providers.started(model, onnxruntime.SessionOptions(), chosen, place).get_providers())
except Exception as error:
    print(type(error).__name__, error)
"""


def _asked(options: dict[str, Any], library: str | None, script: str = _ASK) -> str:
    path = os.pathsep.join([str(library), str(Path.cwd())])
    done = subprocess.run(
        [sys.executable, "-c", script, repr(options)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(GPU_LIBRARY is None, reason=NO_GPU_LIBRARY)
def test_the_gpu_library_names_missing_libraries_and_runs_on_the_cpu() -> None:
    """Listing its kernels, as the library for the CPU does, would end the process here."""
    assert _asked({}, GPU_LIBRARY) == "Compiled\n"
    said = _asked({"device": "cuda"}, GPU_LIBRARY)
    if not torch.cuda.is_available():
        assert said.startswith("Unavailable CUDAExecutionProvider needs ") and ".so." in said.splitlines()[0]


@pytest.mark.skipif(GPU_LIBRARY is None, reason=NO_GPU_LIBRARY)
def test_rejects_a_session_that_falls_back_to_the_cpu() -> None:
    """The library itself falls back to the CPU, which its log alone says."""
    said = _asked({}, GPU_LIBRARY, _START)
    if not torch.cuda.is_available():
        assert said.startswith(f"Unavailable onnxruntime could not start {CUDA}, and would run on {CPU} instead")


@pytest.mark.skipif(RTX_LIBRARY is None, reason=NO_RTX_LIBRARY)
def test_tensorrt_rtx_names_the_missing_driver() -> None:
    said = _asked({"providers": (providers.RTX,)}, RTX_LIBRARY)
    if not torch.cuda.is_available():
        assert said.startswith(f"Unavailable {providers.RTX} needs libcuda.so.1, which is of NVIDIA's driver")


@pytest.mark.skipif(RTX_LIBRARY is not None, reason="ONNXRUNTIME_RTX_LIBRARY has it")
def test_names_the_package_of_a_missing_provider() -> None:
    with pytest.raises(lorac.Unavailable, match=r"pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"):
        compiled(providers=(providers.RTX,))
