"""Pipes, devices, sockets and folders in the place of files: readers refuse them at once."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import lorac
from campaigns import special_files
from lorac.cli._inputs import read_inputs
from lorac.merging import merge_checkpoint
from lorac.merging.recipe import read_merge_recipe
from lorac.trainer import read_recipe
from tests.zoo import ZOO

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have other entries")
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PEFT folder, a file of lorac's own, an artifact and a model's folder."""
    folder = tmp_path_factory.mktemp("sound")
    host = nn.Sequential(nn.Linear(4, 3))
    compiled = lorac.compile(host, {"a": lorac.LoRA(r=1, targets=["0"])}, example_inputs=(torch.ones(2, 4),))
    lorac.save_adapter(compiled.adapters["a"], folder / "peft", model=host)
    lorac.save_adapter(compiled.adapters["a"], folder / "native.safetensors", "native")
    compiled.save(folder / "artifact")
    model = ZOO["tiny_llama"].model()
    model.save_pretrained(folder / "model", max_shard_size="40KB")
    adapter = lorac.compile(model, {"a": lorac.LoRA(r=1, targets=["q_proj"])}).adapters["a"]
    lorac.save_adapter(adapter, folder / "of_model.safetensors", "native")
    for name in ("recipe.yaml", "inputs.npz", "inputs.json", "inputs.safetensors", "a.gguf", "a.pt", "a.onnx_adapter"):
        (folder / name).touch()
    return folder


def _merge(model: Path) -> None:
    merge_checkpoint(model, model.parent / "of_model.safetensors", model.parent / "merged")


READERS: dict[str, Callable[[Path], object]] = {
    "peft/adapter_config.json": lambda path: lorac.load_adapter(path.parent),
    "peft/adapter_model.safetensors": lambda path: lorac.load_adapter(path.parent),
    "native.safetensors": lorac.load_adapter,
    "a.gguf": lorac.load_adapter,
    "a.pt": lorac.load_adapter,
    "a.onnx_adapter": lorac.load_adapter,
    "artifact/manifest.json": lambda path: lorac.load(path.parent),
    "artifact/program.json": lambda path: lorac.load(path.parent),
    "recipe.yaml": read_recipe,
    "recipe.yaml ": lambda path: read_merge_recipe(path.with_name("recipe.yaml")),
    "inputs.npz": read_inputs,
    "inputs.json": read_inputs,
    "inputs.safetensors": read_inputs,
    "model/config.json": lambda path: _merge(path.parent),
    f"model/{INDEX}": lambda path: _merge(path.parent),
    "model/model-00002-of-00017.safetensors": lambda path: _merge(path.parent),
}
"""File of a reader -> the reader."""


@pytest.fixture
def _impatient() -> Iterator[None]:
    """Let a test fail that waits for a pipe."""

    def interrupt(*_: object) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("file", READERS)
def test_rejects_entries_that_are_not_files(file: str, sound: Path, tmp_path: Path) -> None:
    for number, way in enumerate(special_files.WAYS):
        folder = tmp_path / str(number)
        shutil.copytree(sound, folder)
        target = folder / file.strip()
        target.unlink()
        way(target)
        signal.alarm(20)
        with pytest.raises(lorac.LoracError):
            READERS[file](target)
        signal.alarm(0)


def test_the_campaign_puts_every_entry_into_a_folder(tmp_path: Path) -> None:
    for seed in range(40):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "file").touch()
        special_files.put_below(folder, random.Random(seed))
        assert not (folder / "file").is_file() or (folder / "file").is_symlink()
