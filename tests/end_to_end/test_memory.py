"""A compiled model keeps no second copy of its model: without the model it needs the memory of a plain session."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RATIO = 1.15
"""Of a plain ONNX Runtime session of the base, plus the adapters."""
_PRELUDE = """
import ctypes, gc, json, sys
import onnxruntime, onnxscript, psutil, torch, transformers
import lorac, lorac.session, torch.onnx
from tests.zoo import ZOO, built

def rss():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss

name, mode, folder = sys.argv[1:]
entry = ZOO[name]
inputs = entry.inputs()
"""
_COMPILE = (
    _PRELUDE
    + """
import weakref
model = entry.build().eval()
host = weakref.ref(model)
compiled = lorac.compile(model, {"a": lorac.LoRA(r=8, targets=list(entry.targets))}, target="onnxruntime", mode=mode)
compiled(**inputs)
del model
compiled(**inputs)
numbers = {
    "rss": rss(),
    "host": host() is not None,
    "adapters": sum(t.nbytes for a in compiled.adapters.values() for t in a.parameters()),
    "buffers": sum(b.buffer.nbytes for b in compiled.engine.buffers.values()),
}
compiled.save(folder)
print(json.dumps(numbers))
"""
)
_PLAIN = (
    _PRELUDE
    + """
# The same libraries and the same work behind it, so that what differs is what is kept.
model = entry.build().eval()
with torch.no_grad():
    torch.onnx.export(model, kwargs=dict(inputs), f=folder + "/base.onnx", dynamo=True, verbose=False)
del model
settings = onnxruntime.SessionOptions()
settings.log_severity_level = 3
session = onnxruntime.InferenceSession(folder + "/base.onnx", settings)
known = {value.name for value in session.get_inputs()}
session.run(None, {name: tensor.numpy() for name, tensor in inputs.items() if name in known})
print(json.dumps({"rss": rss()}))
"""
)
_LOAD = (
    _PRELUDE
    + """
compiled = lorac.load(folder)
compiled(**inputs)
print(json.dumps({"rss": rss()}))
"""
)


def _measured(script: str, *arguments: str) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_the_host_leaves_no_trace(mode: str, tmp_path: Path) -> None:
    compiled = _measured(_COMPILE, "minilm", mode, str(tmp_path / "artifact"))
    plain = _measured(_PLAIN, "minilm", mode, str(tmp_path))
    loaded = _measured(_LOAD, "minilm", mode, str(tmp_path / "artifact"))
    print(f"{mode}: compiled {compiled}, plain {plain}, loaded {loaded}")
    assert not compiled["host"], "the host is still alive"
    allowed = RATIO * (plain["rss"] + compiled["adapters"]) + compiled["buffers"]
    assert compiled["rss"] <= allowed, f"{compiled['rss'] / allowed * RATIO:.2f} x the plain session"
    assert loaded["rss"] <= allowed, f"{loaded['rss'] / allowed * RATIO:.2f} x the plain session"
