"""Everything but calling works without a GPU: compiling, explaining, swapping, adding, saving, loading."""

from __future__ import annotations

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import lorac
from lorac.backends.tensorrt import backend, library
from lorac.backends.tensorrt.engine import TrtEngine
from lorac.backends.tensorrt.options import TensorRTOptions
from lorac.cli import app
from lorac.storage.artifact import seal_manifest
from lorac.testing import assert_close
from tests.backends.tensorrt.building import NO_GPU, THREE, away, model_of, quietly
from tests.backends.tensorrt.machines import install_gpus, install_nvidias
from tests.backends.tensorrt.tiny import LIBRARY

pytestmark = pytest.mark.skipif(library.local_capability() is not None, reason="there is a GPU here")
ROOT = Path(__file__).parents[3]
X = torch.randn(3, 6, 9, 7, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A convolution, and two layers on its means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 3, padding=1)
        self.left, self.right = nn.Linear(10, 14), nn.Linear(14, 9)

    def forward(self, image: Tensor) -> Tensor:
        return self.right(torch.tanh(self.left(torch.relu(self.conv(image)).mean((2, 3)))))


@functools.cache
def host() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def low(r: int, *targets: str) -> lorac.LoRA:
    return lorac.LoRA(r=r, targets=list(targets))


def compiled(mode: str = "live", **options: Any) -> lorac.Compiled:
    found = quietly(model=host(), adapters={"a": low(2, "conv", "left")}, mode=mode, example_inputs=(X,), **options)
    away(found.adapters["a"], 1)
    return found


@pytest.fixture(scope="module")
def live() -> lorac.Compiled:
    return compiled(target_capabilities=THREE)


def engine_of(found: lorac.Compiled) -> TrtEngine:
    assert isinstance(found.engine, TrtEngine)
    return found.engine


def test_warns_without_a_gpu_and_raises_in_a_call(live):
    with pytest.warns(lorac.LoracWarning, match=NO_GPU):
        lorac.compile(host(), {}, target="tensorrt", example_inputs=(X,))
    assert NO_GPU in str(live.explain())
    with pytest.raises(lorac.Unavailable, match=NO_GPU) as error:
        live(X)
    assert "compiled.save(folder)" in str(error.value)
    with pytest.raises(lorac.ChoiceError, match="no input 'x'"):  # what is wrong with a call is said first
        live(x=X)


def test_swaps_and_adds_adapters_without_a_rebuild(live):
    engine = engine_of(live)
    before = {name: part.file.digest() for name, part in engine.graphs.items()}
    slots = live.switch.state.bound.tensors
    assert slots["left:a"].shape == (1, 10, 2) and slots["left:a"].abs().sum() > 0
    live.swap(None)
    idle = live.switch.state.bound.tensors
    assert idle["left:a"].shape == (1, 10, 1) and not idle["left:a"].any()  # rank 1 of zeros, and never 0
    assert idle["conv:a"].shape == (2, 6, 3, 3) and not idle["conv:a"].any()
    live.add_adapter(low(1, "left", "conv"), name="b")
    away(live.adapters["b"], 2)
    live.swap("b")
    bound = live.switch.state.bound.tensors
    assert bound["left:a"].shape == (1, 10, 1)
    assert bound["conv:a"].shape == (2, 6, 3, 3) and bound["conv:a"][0].any() and not bound["conv:a"][1:].any()
    live.swap({"a": 0.5})
    live.remove_adapter("b")
    live.swap("a")
    again = live.switch.state.bound.tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in slots.items())
    assert before == {name: part.file.digest() for name, part in engine.graphs.items()}


def test_rejects_a_rank_above_the_slot_and_names_the_reserve(live):
    with pytest.raises(lorac.NeedsRecompile, match="'conv' holds rank 2, not 5") as error:
        live.add_adapter(low(5, "conv"), name="wide")
    advice = str(error.value)
    assert "reserve=lorac.Reserve(targets=['conv'], rank=5)" in advice
    roomy = quietly(model=host(), example_inputs=(X,), reserve=lorac.Reserve(targets=["conv"], rank=5))
    roomy.add_adapter(low(5, "conv"), name="wide")
    roomy.swap("wide")
    assert roomy.switch.state.bound.tensors["conv:a"].shape[0] == 5


def test_fused_weights_are_written_from_the_base(live):
    found = compiled("fused", active=None)
    engine = engine_of(found)
    assert {name: tuple(tensor.shape) for name, tensor in engine.memory.items()} == {
        "conv:weight": (10, 6, 3, 3),
        "left:weight": (10, 14),
    }
    base = {name: tensor.clone() for name, tensor in engine.memory.items()}
    found.swap("a")
    a = found.adapters["a"].tensors["left"]
    with torch.no_grad():
        wanted = host().left.weight + 4 * a["lora_B"] @ a["lora_A"]
    assert_close(engine.memory["left:weight"].t(), wanted)
    found.swap(None)
    assert all(torch.equal(engine.memory[name], tensor) for name, tensor in base.items())


def test_shows_the_emitted_graph(live):
    shown = str(live.graph["main"].emitted)
    assert "@emitted" in shown and "MatMul" in shown and "left:a" in shown
    model = model_of(engine_of(live))
    ops = {(node.domain, node.op_type) for node in model.graph.node}
    assert {domain for domain, _ in ops} == {""}
    assert not {tensor.name for tensor in model.graph.initializer} & {value.name for value in model.graph.input}


@pytest.mark.slow("in this process")
def test_loads_in_a_new_process_without_a_gpu(live, tmp_path):
    live.swap("a")
    live.save(tmp_path / "saved")
    script = """
import sys, warnings
import lorac
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    loaded = lorac.load(sys.argv[1])
print([str(one.message).splitlines()[0] for one in warned])
print(loaded.active, sorted(loaded.engine.slots), loaded.engine.graphs["main"].facts.capabilities)
loaded.swap(None); loaded.swap("a")
print(loaded.switch.state.bound.tensors["left:a"].double().sum().item())
try:
    loaded([[[[0.0] * 7] * 9] * 6] * 3)
except lorac.Unavailable as error:
    print(str(error).splitlines()[0])
print([name for name in ("onnxscript", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "saved")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    warned, what, total, error, imported = done.stdout.strip().splitlines()
    assert NO_GPU in warned and NO_GPU in error
    assert what == f"{{'a': 1.0}} ['conv:a', 'conv:b', 'left:a', 'left:b'] {tuple(THREE)}"
    assert float(total) == live.switch.state.bound.tensors["left:a"].double().sum().item()
    assert imported == "[]"


def test_rejects_an_artifact_of_another_release(live, tmp_path):
    stored = backend.BACKEND.store(live.engine, tmp_path, None)
    graphs = {"main": {**stored["graphs"]["main"], "made_by": "tensorrt_rtx 0.9"}}
    with pytest.raises(lorac.ArtifactError, match=r"made by tensorrt_rtx 0\.9") as error:
        backend.BACKEND.restore({**stored, "graphs": graphs}, {}, {}, "live", None)
    assert LIBRARY.name_and_version in str(error.value)


def test_rejects_an_artifact_for_another_gpu(live, monkeypatch):
    (part,) = engine_of(live).graphs.values()
    backend._check_gpu(part.facts, None)
    install_gpus(monkeypatch, "9.0", "8.9", "8.0")
    backend._check_gpu(part.facts, "cuda:1")
    with pytest.raises(lorac.Unavailable, match=r"GPU 0 has compute capability 9\.0.*8\.6, 8\.9, 12\.0") as other:
        backend._check_gpu(part.facts, None)
    assert "builds for" in str(other.value)  # of which this is none
    with pytest.raises(lorac.Unavailable, match=r"target_capabilities=\['8\.6', '8\.9', '12\.0', '8\.0'\]"):
        backend._check_gpu(part.facts, "cuda:2")
    with pytest.raises(lorac.Unavailable, match="no device 'cuda:3'"):
        backend._check_gpu(part.facts, "cuda:3")


@pytest.mark.medium("test_rejects_a_device_that_is_not_a_gpu")
def test_builds_a_plan_for_the_given_device(monkeypatch):
    install_gpus(monkeypatch, "8.6", "12.0")
    found = {device: compiled(device=device, target_capabilities=[], self_test=False) for device in (None, "cuda:1")}
    assert [engine_of(one).graphs["main"].facts.capabilities for one in found.values()] == [("8.6",), ("12.0",)]
    with pytest.raises(lorac.Unavailable, match="no device 'cuda:2'"):
        compiled(device="cuda:2")


def test_a_plan_cache_that_an_artifact_names_is_not_looked_into(live, tmp_path):
    live.save(tmp_path / "saved")
    manifest = tmp_path / "saved" / "manifest.json"
    fields = json.loads(manifest.read_text())
    fields["program"]["options"]["plan_cache"] = str(tmp_path)
    manifest.write_text(json.dumps(seal_manifest(fields)))
    with pytest.warns(lorac.LoracWarning, match=NO_GPU):
        assert engine_of(lorac.load(tmp_path / "saved")).options.plan_cache is None


def test_an_artifact_runs_in_its_own_library(live, tmp_path, monkeypatch):
    """On a machine with both, which would build with the other one."""
    live.save(tmp_path / "saved")
    install_nvidias(monkeypatch)
    install_gpus(monkeypatch, "8.9")
    assert TensorRTOptions().builder.name == "tensorrt"
    loaded = engine_of(lorac.load(tmp_path / "saved"))
    assert loaded.options.builder is LIBRARY and loaded.graphs["main"].facts.made_by == LIBRARY.name_and_version


def test_rejects_a_device_that_is_not_a_gpu(live, tmp_path):
    live.save(tmp_path / "saved")
    with pytest.raises(lorac.Unavailable, match="runs on a GPU, not on 'cpu'"):
        lorac.load(tmp_path / "saved", device="cpu")
    with pytest.raises(lorac.OptionError, match="runs on NVIDIA GPUs, and not on device 'cpu'"):
        compiled(device="cpu")
    assert engine_of(compiled(device="cuda:1", self_test=False)).options.device == "cuda:1"


@pytest.mark.medium("test_calls.py writes weights into a plan")
def test_two_builds_have_the_same_size(live):
    again = compiled(target_capabilities=THREE)
    sizes = [[part.file.size for part in engine_of(found).graphs.values()] for found in (live, again)]
    assert sizes[0] == sizes[1]
    alone = compiled(target_capabilities=["8.6"])  # one plan holds nothing twice for several GPUs
    assert abs(sizes[0][0] - engine_of(alone).graphs["main"].file.size) <= 64


@pytest.mark.medium("runtime/test_traits.py on other targets")
def test_several_components_are_a_plan_each():
    found = quietly(
        model={"one": host(), "two": copy.deepcopy(host())},
        adapters={"a": low(2, "one.left", "two.right")},
        example_inputs={"one": (X,), "two": (X,)},
    )
    engine = engine_of(found)
    assert set(engine.graphs) == {"one", "two"}
    assert [sorted(part.slots) for part in engine.graphs.values()] == [
        ["one.left:a", "one.left:b"],
        ["two.right:a", "two.right:b"],
    ]
    with pytest.raises(lorac.Unavailable, match=NO_GPU):
        found["two"](X)


@pytest.mark.medium("mistakes_of_devices.py: a package that is not installed")
def test_names_the_command_that_installs_a_missing_library():
    script = """
import sys
sys.modules["tensorrt"] = sys.modules["tensorrt_rtx"] = None
import lorac, torch
try:
    lorac.compile(torch.nn.Linear(2, 2), {}, target="tensorrt")
except lorac.MissingExtra as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == 'tensorrt_rtx is not installed\n  pip install "lorac[tensorrt]"\n'


@pytest.mark.medium("cli/test_cli.py compiles for ONNX Runtime by the same command")
def test_the_command_line_compiles_for_tensorrt(tmp_path):
    module = "tests.backends.tensorrt.test_engine:host"
    np.savez(tmp_path / "inputs.npz", image=X.numpy())
    arguments = ["compile", module, "-o", str(tmp_path / "out"), "--target", "tensorrt", "--capabilities", "8.6,8.9"]
    with pytest.warns(lorac.LoracWarning, match=NO_GPU):
        done = CliRunner().invoke(app, [*arguments, "--inputs", str(tmp_path / "inputs.npz")], catch_exceptions=False)
    assert done.exit_code == 0 and "tensorrt, auto" in done.stdout
    with pytest.warns(lorac.LoracWarning, match=NO_GPU):
        assert lorac.load(tmp_path / "out").engine.graphs["main"].facts.capabilities == ("8.6", "8.9")
