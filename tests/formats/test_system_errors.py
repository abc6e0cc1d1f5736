"""Errors of the system become errors of lorac's with the path, so that LoracError catches them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import lorac
from tests.refusing import refuses
from tests.zoo import ZOO

MODEL = ZOO["plain_mlp"].model


@pytest.fixture
def adapter() -> lorac.Adapter:
    return lorac.compile(MODEL(), {"a": lorac.LoRA(r=2, targets=["up"])}).adapters["a"]


def test_rejects_paths_that_do_not_exist(tmp_path: Path) -> None:
    for path in (tmp_path / "x", tmp_path / "x" / "y"):
        with refuses("unknown_format", match="there is no adapter at"):
            lorac.load_adapter(path)
        with pytest.raises(lorac.ArtifactError, match="there is no compiled model at"):
            lorac.load(path)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_file_that_cannot_be_read(file: str, adapter: lorac.Adapter, tmp_path: Path, monkeypatch: Any) -> None:
    """Without permission, or removed between the check and the opening."""
    lorac.save_adapter(adapter, tmp_path / "it", model=MODEL())
    original = os.open

    def refuse(path: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(path).name == file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return original(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    with refuses("unreadable", match=f"{file}' cannot be read: Permission denied"):
        lorac.load_adapter(tmp_path / "it")


def test_rejects_saving_below_a_file(adapter: lorac.Adapter, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for save in (
        lambda: lorac.save_adapter(adapter, tmp_path / "file" / "below", model=MODEL()),
        lambda: lorac.save_adapter(adapter, tmp_path / "file" / "below", "native"),
    ):
        with refuses("unreadable", match="cannot be written"):
            save()
    (tmp_path / "it").mkdir()
    (tmp_path / "it" / "adapter_config.json").mkdir()
    with pytest.raises(lorac.LoracError):
        lorac.load_adapter(tmp_path / "it")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "it"]


def test_an_artifact_that_cannot_be_written_or_read(llama_folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    compiled = lorac.load(llama_folder)
    (tmp_path / "file").write_text("x")
    with pytest.raises(lorac.ArtifactError, match=r"file.* cannot be written"):
        compiled.save(tmp_path / "file" / "below")
    compiled.save(tmp_path / "it")

    def vanish(*args: Any) -> Any:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "weights.safetensors")

    monkeypatch.setattr("lorac.session.loading.Manifest.adapters", vanish)
    with pytest.raises(lorac.ArtifactError, match=r"weights\.safetensors"):
        lorac.load(tmp_path / "it")
