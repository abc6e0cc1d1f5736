"""Compiled models to save, and helpers for folders and processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from torch import Tensor

import lorac
from tests.zoo import ZOO


def make_adapters(name: str, model: Any) -> dict[str, lorac.Adapter]:
    """Three adapters of two methods and ranks, away from their init."""
    targets = list(ZOO[name].targets)
    fresh = {
        "a": lorac.LoRA(r=3, targets=targets),
        "b": lorac.DoRA(r=1, targets=targets),
        "late": lorac.DoRA(r=2, alpha=4, targets=targets),
    }
    made = dict(lorac.compile(model, fresh).adapters)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in made.values():
            for tensor in adapter.parameters():
                tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return made


def make_compiled(name: str, target: str, mode: str) -> tuple[lorac.Compiled, lorac.Adapter]:
    model = ZOO[name].fresh()
    adapters = make_adapters(name, model)
    late = adapters.pop("late")
    active = {"a": 0.7, "b": 0.4}
    return (
        lorac.compile(model, adapters, target=target, mode=mode, active=active, example_inputs=ZOO[name].inputs()),
        late,
    )


def assert_same_folders(one: Path, two: Path) -> None:
    files = {path.relative_to(one) for path in one.rglob("*")}
    assert files == {path.relative_to(two) for path in two.rglob("*")}
    for file in files:
        if (one / file).is_file():
            assert (one / file).read_bytes() == (two / file).read_bytes(), file


def alone(model: Path, inputs: dict[str, Tensor], adapter: Path | None = None) -> dict[str, Tensor]:
    """Return what ONNX Runtime alone answers to the model's own inputs."""
    settings, options = ort.SessionOptions(), ort.RunOptions()
    settings.log_severity_level = 3
    session = ort.InferenceSession(model, settings)
    if adapter is not None:
        read = ort.LoraAdapter()
        read.Load(str(adapter))
        options.add_active_adapter(read)
    names = [value.name for value in session.get_outputs()]
    arrays = session.run(names, {name: tensor.numpy() for name, tensor in inputs.items()}, options)
    return {name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)}


def run_python(script: str, **environment: str) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]
