"""An open file stays the one that was opened, whatever happens to its name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from lorac import ArtifactError, FormatError
from lorac.storage import open_file
from lorac.storage.open_file import OpenFile, open_files
from lorac.storage.tensor_file import TensorFile, TensorLocation, raw_bytes, write_safetensors
from tests.refusing import refuses

linux = pytest.mark.skipif(not open_file._has_handle_paths(), reason="open files have no paths here")


def _removed(path: Path) -> None:
    shutil.rmtree(path.parent)


def _replaced(path: Path) -> None:
    other = path.parent / "other"
    other.write_bytes(b"other")
    os.replace(other, path)


def _exchanged(path: Path) -> None:
    path.parent.rename(path.parent.parent / "aside")
    path.parent.mkdir()
    path.write_bytes(b"other")


WAYS = [_removed, _replaced, _exchanged]


@linux
@pytest.mark.parametrize("gone", WAYS)
def test_reads_an_open_file_after_its_removal(gone: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    file = open_files(path.parent, ["file"])["file"]
    gone(path)
    assert file.read() == bytes(file.mapped()) == b"mine"
    assert file.size == 4
    assert file.digest() == hashlib.blake2b(hashlib.blake2b(b"mine").digest(), digest_size=16).hexdigest()
    file.copy_to(tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "copy").read_bytes() == b"mine"


@linux
def test_tensors_of_a_file_that_is_gone(tmp_path: Path) -> None:
    path, wanted = tmp_path / "folder" / "file", torch.randn(3, 4)
    path.parent.mkdir()
    TensorFile.write(path, {"a": wanted})
    file = TensorFile(OpenFile(path))
    _removed(path)
    assert torch.equal(file["a"], wanted)


@linux
def test_tensors_of_a_file_share_a_mapping(tmp_path: Path) -> None:
    wanted = {"a": torch.randn(3, 4), "b": torch.arange(5), "half": torch.randn(3).half(), "none": torch.empty(0, 2)}
    TensorFile.write(tmp_path / "file", wanted, transposed=["a"])
    file = TensorFile(OpenFile(tmp_path / "file"))
    found = {name: file[name] for name in wanted}
    for name, value in wanted.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype
    assert _mappings(tmp_path / "file") == 1
    found["b"] += 1  # what is written there never reaches the file
    del found
    assert _mappings(tmp_path / "file") == 0
    assert torch.equal(file["b"], wanted["b"])


def _mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text(encoding="utf-8").count(f"{path}\n")


@pytest.mark.parametrize("gone", WAYS)
def test_rejects_a_replaced_file_without_paths_of_open_files(
    gone: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_file, "_has_handle_paths", lambda: False)
    path = tmp_path / "folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    file = OpenFile(path)
    assert file.read() == b"mine"
    gone(path)
    with pytest.raises(ArtifactError, match="removed or replaced"):
        file.read()


def test_rejects_links_folders_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(__file__)
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe", ".", "nothing"):
        with pytest.raises(OSError):
            OpenFile(tmp_path / name)


def test_errors_name_the_original_path(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"mine")
    with refuses("corrupt_file") as error, OpenFile(path).named() as given:
        raise FormatError(f"'{given}' is damaged", next_step=f"look at {given}", code="corrupt_file")
    assert str(error.value) == f"'{path}' is damaged\n  look at {path}"


def test_a_file_is_let_go_with_its_object(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"mine")
    file = OpenFile(path)
    handle = file._handle
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


def test_a_hash_depends_on_every_byte_and_its_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_file, "_PIECE", 4)
    monkeypatch.setattr(open_file, "_CHUNK", 3)
    found = set()
    for content in (b"", b"mine", b"mine and", b"and mine", b"mine andx", b"mine an\0"):
        (tmp_path / "file").write_bytes(content)
        found.add(open_files(tmp_path, ["file"])["file"].digest())
    assert len(found) == 6


@pytest.mark.parametrize("begin", [0, 3, 7])
def test_a_tensor_that_is_a_part_of_another_files(begin: int, tmp_path: Path) -> None:
    """Some columns of a matrix, the last among them, are read where they lie."""
    wide = torch.randn(4, 9)
    wanted = wide[:, begin : begin + 2]
    (tmp_path / "other").write_bytes(b"head" + bytes(raw_bytes(wide)))
    place = TensorLocation("other", 4 + begin * wide.itemsize, by_columns=False, row=wide[0].nbytes)
    TensorFile.write(tmp_path / "file", {"a": wanted}, elsewhere={"a": place})
    files = open_files(tmp_path, ["file", "other"])
    assert torch.equal(TensorFile(files["file"], files)["a"], wanted)
    assert torch.equal(TensorFile(files["file"], files).load_all()["a"], wanted)


@pytest.mark.parametrize(
    "change",
    [
        {"file": "nowhere"},
        {"offset": -4},
        {"offset": 64},
        {"offset": "0"},
        {"dtype": "X"},
        {"shape": [16]},
        {"shape": 3},
        {"row": 8},
        {"row": 14},
        {"row": 64},
        {"row": "12"},
    ],
    ids=str,
)
def test_a_tensor_that_another_file_holds(change: dict[str, Any], tmp_path: Path) -> None:
    wanted = torch.randn(3, 5)
    (tmp_path / "other").write_bytes(b"head" + bytes(raw_bytes(wanted.t())))
    place = TensorLocation("other", 4, by_columns=True)
    TensorFile.write(tmp_path / "file", {"a": wanted, "b": wanted[:2].clone()}, elsewhere={"a": place})
    files = open_files(tmp_path, ["file", "other"])
    found = TensorFile(files["file"], files)
    assert torch.equal(found["a"], wanted)
    assert torch.equal(found["b"], wanted[:2])
    found["a"].zero_()  # the reader's own memory
    assert torch.equal(found["a"], wanted)
    with safe_open(tmp_path / "file", framework="pt") as opened:
        metadata, stored = opened.metadata(), {"b": opened.get_tensor("b")}
    entries = json.loads(metadata["elsewhere"])
    entries["a"] |= change
    write_safetensors(tmp_path / "damaged", stored, {**metadata, "elsewhere": json.dumps(entries)})
    with pytest.raises(ArtifactError, match="outside of the program's files"):
        TensorFile(open_files(tmp_path, ["damaged"])["damaged"], files)
