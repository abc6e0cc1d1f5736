"""`import lorac` is light: measured in processes of their own."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

import lorac
from lorac.errors import EXTRAS
from lorac.storage.artifact import write_artifact

ROOT = Path(__file__).parents[2]
RUNS = 3
LIMIT = 0.3
HEAVY = (
    "transformers",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "openvino",
    "peft",
    "onnxscript",
    "diffusers",
    "accelerate",
)

# The names that people touch first must stay light too, so the lazy ones are reached for.
SCRIPT = """
import time, torch
start = time.perf_counter()
import lorac
bare = time.perf_counter() - start
lorac.compile, lorac.LoRA, lorac.variants()
import sys
loaded = sorted(set(sys.modules) & set({heavy!r}))
print(bare, ",".join(loaded))
"""


def _run():
    script = SCRIPT.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    seconds, _, loaded = done.stdout.strip().partition(" ")
    return float(seconds), loaded


@pytest.mark.medium("cli/test_cli.py imports the package and nothing heavy; ruff refuses it (TID253)")
def test_importing_lorac_is_fast_and_loads_no_heavy_library():
    for _ in range(RUNS):  # other work on the machine only ever adds to a run: one that is quick decides
        seconds, loaded = _run()
        assert not loaded
        if seconds <= LIMIT:
            break
    assert seconds <= LIMIT


# --- without optional libraries --------------------------------------------------------------------------------------


OTHERS = ("google", "peft", "psutil", "scipy", "timm", "tokenizers", "torchvision")
"""Libraries that come with an extra and that lorac need not name."""
WITHOUT = """
import contextlib, io, json, sys

tried = []

class Hidden:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            tried.append(name)
            return None
        return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hidden, sys.meta_path)
import lorac
from lorac.cli import main

def run(*words):
    sys.argv, code = ["lorac", *words], None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    return [code, out.getvalue()]

def in_python():
    import lorac.testing, torch, tiny
    adapters, example = {{"a": lorac.LoRA(r=2, targets="all-linear")}}, (torch.ones(3, 6),)
    compiled = lorac.compile(tiny.make(), adapters, active="a", example_inputs=example)
    compiled.train()
    loss = compiled(torch.ones(3, 6)).square().sum()
    loss.backward()
    torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=0.1).step()
    trained = compiled.eval()(torch.ones(3, 6))
    compiled.save("eager")
    lorac.testing.assert_close(lorac.load("eager")(torch.ones(3, 6)), trained)
    return [0, str(compiled)]

found = {{"import": [len(tried), str(tried)], "python": in_python()}}
for line in {lines!r}:
    found[line] = run(*line.split())
print(json.dumps(found))
"""
TINY = """
import torch
from torch import nn

def make(shift=0.0):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    with torch.no_grad():
        layers[2].weight.add_(shift)
    return layers

def tuned():
    return make(0.1)
"""
RECIPE = "merge_method: linear\nadapters:\n  - adapter: a\n    parameters: {weight: 0.5}\n"
WORKS = (
    "variants",
    "sites tiny:make",
    "inspect a --model tiny:make",
    "inspect a.onnx_adapter",
    "check a --model tiny:make",
    "convert a a.safetensors --to native",
    "convert a.onnx_adapter read --to native",
    "convert dora lora --rank 2 --model tiny:make",
    "resize a small --rank 1",
    "extract tiny:tuned tiny:make tuned --rank 2",
    "diff a b",
    "merge -a one=a=0.7 -a other=b=0.3 --method ties -o merged --model tiny:make",
    "merge --recipe recipe.yaml -o half --model tiny:make",
    "compile tiny:make -a a=a -o folder --target eager --inputs inputs.npz",
    "inspect folder",
    "swap folder none --save",
    "explain tiny:make -a a=a",
)
NEEDS = {
    "compile tiny:make -a a=a -o program": ("onnxruntime", "onnxruntime"),
    "explain tiny:make -a a=a --target onnxruntime": ("onnxruntime", "onnxruntime"),
    "explain tiny:make -a a=a --html page.html --target tensorrt": ("tensorrt_rtx", "tensorrt"),
    "inspect program.of.another": ("onnxruntime", "onnxruntime"),
    "run program.of.another": ("onnxruntime", "onnxruntime"),
    "convert a b.onnx_adapter --to onnx_adapter": ("onnxruntime", "onnxruntime"),
    "convert a b.gguf --to gguf --model tiny:make": ("gguf", "gguf"),
    "sites of_transformers": ("transformers", "hf"),
    "inspect user/adapter": ("huggingface_hub", "hf"),
    "sites of_diffusers": ("diffusers", "diffusers"),
    "retrieve red --from .": ("transformers", "hf"),
    "train train.yaml": ("trl", "train"),
    "train plain.yaml": ("transformers", "hf"),
    "serve folder": ("fastapi", "serve"),
}
"""Command -> the library that it misses first, and the extra that brings it."""


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """Each command's output and exit status, in one process where no optional library can be imported."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "tiny.py").write_text(TINY)
    (folder / "recipe.yaml").write_text(RECIPE)
    np.savez(folder / "inputs.npz", input=np.ones((3, 6), np.float32))
    for name, task in (("train", "sft"), ("plain", "image-classification")):
        fields = f"model: tiny:make\nout: {name}\ntask: {task}\nadapters: {{a: {{method: lora}}}}\nmax_steps: 1\n"
        (folder / f"{name}.yaml").write_text(fields)
    for name, config in (("transformers", {"architectures": ["Any"]}), ("diffusers", {"_class_name": "Any"})):
        (folder / f"of_{name}").mkdir()
        (folder / f"of_{name}" / "config.json").write_text(json.dumps(config))
    host = runpy.run_path(str(folder / "tiny.py"))["make"]()
    methods = {"a": lorac.LoRA(r=2), "b": lorac.LoRA(r=2), "dora": lorac.DoRA(r=2)}
    methods = {name: dataclasses.replace(method, targets="all-linear") for name, method in methods.items()}
    compiled = lorac.compile(host, methods)
    for name, adapter in compiled.adapters.items():
        for tensor in adapter.parameters():
            torch.nn.init.normal_(tensor.data)
        lorac.save_adapter(adapter, folder / name, model=host)
    pytest.importorskip("onnxruntime", reason="ONNX Runtime writes the .onnx_adapter that is read without it")
    lorac.save_adapter(compiled.adapters["a"], folder / "a.onnx_adapter", format="onnx_adapter", model=host)
    fields = ("plans", "reductions", "active", "adapters", "host", "program", "components", "versions")
    empty = {field: {} for field in fields}
    write_artifact(folder / "program.of.another", lambda _: {"target": "onnxruntime", "mode": "live", **empty})
    script = WITHOUT.format(names={*EXTRAS, *OTHERS}, lines=[*WORKS, *NEEDS])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.medium("ruff refuses such imports at a module's top (TID253)")
@pytest.mark.parametrize("command", ["import", "python", *WORKS])
def test_works_without_any_optional_library(command, without):
    assert without[command][0] == 0, without[command][1]


@pytest.mark.medium("backends/test_throw_away.py names the missing library of a target")
@pytest.mark.parametrize("command", NEEDS)
def test_names_the_extra_of_a_missing_library(command, without):
    library, extra = NEEDS[command]
    assert without[command] == [
        1,
        f'lorac.MissingExtra: {library} is not installed\n  pip install "lorac[{extra}]"\n',
    ]


def test_the_extra_of_a_library_is_the_one_that_lists_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {
        (re.split(r"[^\w-]", line)[0].replace("-", "_").replace("pillow", "PIL"), extra)
        for extra, lines in project["optional-dependencies"].items()
        for line in lines
        if extra not in {"dev", "docs"} and not line.startswith("lorac[")
    }
    known = {(name.replace("-", "_"), extra) for name, extra in EXTRAS.items() if extra is not None}
    not_missed = {("onnxruntime_gpu", "cuda"), ("filelock", "serve")}  # PyTorch brings the latter
    assert known == listed - not_missed
    base = {re.split(r"[^\w-]", line)[0] for line in project["dependencies"]}
    assert base.isdisjoint(EXTRAS)
    absent = {name for name, extra in EXTRAS.items() if extra is None}
    assert absent.isdisjoint(name for name, _ in listed)
