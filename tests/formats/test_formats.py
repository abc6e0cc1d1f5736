"""Finding the format of a file, and formats found by their existence."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

import lorac.formats
from campaigns import sound
from lorac import Adapter, FormatError, LoRA, load_adapter, save_adapter
from lorac.formats import formats
from tests import peft_files
from tests.formats.oracle import assert_equal
from tests.refusing import refuses
from tests.zoo import ZOO


@pytest.fixture
def adapter() -> Adapter:
    tensors = {"lora_A": torch.randn(2, 10), "lora_B": torch.randn(14, 2)}
    return Adapter("mine", LoRA(r=2, targets=("up",)), {"up": tensors})


@pytest.fixture
def folder(tmp_path: Path, adapter: Adapter) -> Path:
    save_adapter(adapter, tmp_path / "sql", model=ZOO["plain_mlp"].model())
    return tmp_path / "sql"


def test_rejects_a_missing_path(tmp_path: Path, folder: Path) -> None:
    with refuses("unknown_format", match="there is no adapter at") as error:
        load_adapter(tmp_path / "sq")
    assert error.value.nearest == "sql"
    with refuses("unknown_format"):
        load_adapter(tmp_path / "no" / "such" / "folder")


def test_no_format(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with refuses("unknown_format") as error:
        load_adapter(tmp_path / "a.txt")
    assert "docs/formats.md" in str(error.value)
    assert all(name in str(error.value) for name in formats())
    with refuses("unknown_format", match="is a folder of adapters") as error:
        load_adapter(tmp_path)
    assert error.value.next_step == f"did you mean '{folder}'?"


def test_distinguishes_damaged_from_unknown_files(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "x.safetensors")
    with refuses("unknown_format"):
        load_adapter(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-1])
    with refuses("corrupt_file"):
        load_adapter(tmp_path / "x.safetensors")


def test_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_adapter(folder).name == "sql"
    assert load_adapter(str(folder), name="other").name == "other"
    assert load_adapter(folder / "adapter_config.json").name == "sql"
    monkeypatch.chdir(folder)
    assert load_adapter(".").name == "sql"


def test_peft_files_are_the_same_bytes_twice(tmp_path: Path, adapter: Adapter) -> None:
    model = ZOO["plain_mlp"].model()
    for name in ("a", "b"):
        save_adapter(adapter, tmp_path / name, model=model)
    save_adapter(load_adapter(tmp_path / "a", model), tmp_path / "c", model=model)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        contents = {(tmp_path / name / file).read_bytes() for name in ("a", "b", "c")}
        assert len(contents) == 1, file


def test_fields_without_consequence_are_kept(tmp_path: Path) -> None:
    model, inputs = ZOO["tiny_bert"].fresh(), ZOO["tiny_bert"].inputs()
    config = LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")
    peft_files.make_peft(model, tmp_path / "a", config, inputs=inputs)
    path = tmp_path / "a" / "adapter_config.json"
    origin = {"base_model_name_or_path": "somewhere/else", "revision": "abc"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **origin}))
    save_adapter(load_adapter(tmp_path / "a", model), tmp_path / "b", model=model)
    first, second = (LoraConfig.from_pretrained(str(tmp_path / name)) for name in ("a", "b"))
    assert first == second
    assert second.base_model_name_or_path == "somewhere/else"


@pytest.mark.parametrize("format", ["peft", "native"])
def test_a_failed_save_changes_no_file(
    tmp_path: Path, adapter: Adapter, format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = ZOO["plain_mlp"].model(), tmp_path / "x"
    save_adapter(adapter, target, format, model)

    def contents() -> dict[str, bytes]:
        return {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    before = contents()
    other = Adapter("mine", adapter.variant, {"up": {n: t + 1 for n, t in adapter.tensors["up"].items()}})
    monkeypatch.setattr("lorac.storage.tensor_file.raw_bytes", lambda tensor: (_ for _ in ()).throw(OSError))
    with refuses("unreadable"):
        save_adapter(other, target, format, model)  # while writing
    assert contents() == before
    monkeypatch.undo()
    monkeypatch.setattr("lorac.storage.atomic_folders._install", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_adapter(other, target, format, model)  # while moving into place
    assert contents() == before
    monkeypatch.undo()
    save_adapter(other, target, format, model)
    assert_equal(load_adapter(target, model), other)
    assert contents().keys() == before.keys()


def test_other_files_in_the_folder_stay(folder: Path, adapter: Adapter) -> None:
    (folder / "README.md").write_text("mine")
    (folder / "checkpoint-1").mkdir()
    save_adapter(adapter, folder, model=ZOO["plain_mlp"].model())
    assert (folder / "README.md").read_text() == "mine"
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint-1",
    ]  # fmt: skip


def test_folders_and_files_are_not_exchanged(tmp_path: Path, folder: Path, adapter: Adapter) -> None:
    with pytest.raises(FormatError, match="is a folder, which the format 'native' does not write"):
        save_adapter(adapter, folder, "native")
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="is a file, which the format 'peft' does not write"):
        save_adapter(adapter, tmp_path / "file", model=ZOO["plain_mlp"].model())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "sql"]


def test_unknown_format_to_save_in(tmp_path: Path, adapter: Adapter) -> None:
    with refuses("unknown_format", match="'pfet'") as error:
        save_adapter(adapter, tmp_path / "x", "pfet")
    assert error.value.nearest == "peft"


def test_tensors_that_train_are_written_as_they_are(tmp_path: Path, adapter: Adapter) -> None:
    parameters = {n: torch.nn.Parameter(t) for n, t in adapter.tensors["up"].items()}
    trained = Adapter("mine", adapter.variant, {"up": dict(parameters)})
    save_adapter(trained, tmp_path / "x", model=ZOO["plain_mlp"].model())
    again = load_adapter(tmp_path / "x")
    assert_equal(again, adapter)
    assert not any(tensor.requires_grad for tensor in again.parameters())
    assert set(load_file(tmp_path / "x" / "adapter_model.safetensors")) == {
        "base_model.model.up.lora_A.weight", "base_model.model.up.lora_B.weight",
    }  # fmt: skip


@pytest.fixture
def another_format(tmp_path: Path) -> Iterator[None]:
    source = """
from lorac.formats import Format
from lorac.variants.adapter import Adapter
from lorac.variants.lora import LoRA


class ThrowAwayFormat(Format):
    name = "throwaway"
    looks_for = "a file that ends in .throwaway"

    def recognises(self, file):
        return file.suffix == ".throwaway"

    def read(self, file, view, name):
        return Adapter(name or file.adapter_name, LoRA())
"""
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "throwaway.py").write_text(source)
    lorac.formats.__path__.append(str(tmp_path / "package"))
    formats.cache_clear()
    yield
    lorac.formats.__path__.pop()
    sys.modules.pop("lorac.formats.throwaway", None)
    formats.cache_clear()


def test_a_file_is_a_format(another_format: None, tmp_path: Path, adapter: Adapter) -> None:
    assert set(formats()) == {*sound.FORMATS, "throwaway"}
    (tmp_path / "some.throwaway").write_text("x")
    assert load_adapter(tmp_path / "some.throwaway").name == "some"
    with refuses("unknown_format", match="cannot be saved in the format 'throwaway'"):
        save_adapter(adapter, tmp_path / "other", "throwaway")
