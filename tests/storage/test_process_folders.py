"""Folders that processes leave behind are swept, those of living ones and of others never."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import pytest

from lorac.storage.process_folders import (
    find_process_folders,
    make_process_folder,
    make_temporary_folder,
    remove_abandoned,
    remove_with_owner,
)
from tests.runtime.artifacts import run_python
from tests.storage.writers import start


def _leave(parent: Path, mark: str) -> None:
    (make_process_folder(parent, mark) / "file").write_text("left")
    os._exit(9)


def _abandoned(parent: Path, mark: str) -> Path:
    """A folder of a process that was killed."""
    known = set(parent.iterdir())
    start(_leave, parent, mark).join(60)
    (made,) = set(parent.iterdir()) - known
    return made


def test_only_folders_of_ended_processes_are_swept(tmp_path: Path) -> None:
    own = make_process_folder(tmp_path, ".it.")
    left = _abandoned(tmp_path, ".it.")
    host, process, start_, rest = left.name.removeprefix(".it.lorac-").split("-")
    others = [
        ".it.lorac-notes",
        ".it.lorac-x" + left.name,
        f".it.lorac-{'0' * 8}-{process}-{start_}-{rest}",  # of another machine
        f"lorac-{host}-{process}-{start_}-{rest}",
        f".it.else.lorac-{host}-{process}-{start_}-{rest}",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    link = tmp_path / f"{left.name[:-1]}{'a' if left.name.endswith('_') else '_'}"
    link.symlink_to(own)
    assert set(find_process_folders(tmp_path, ".it.")) == {own, left, tmp_path / others[2]}
    remove_abandoned(tmp_path, ".it.")
    assert {path.name for path in tmp_path.iterdir()} == {own.name, link.name, *others}


def test_a_number_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    """In a container the first process has the number 1 after every start."""
    own = make_process_folder(tmp_path, "")
    before, _, rest = own.name.rpartition(f"-{os.getpid()}-")
    ended = tmp_path / f"{before}-{os.getpid()}-1-{rest.rpartition('-')[2]}"
    ended.mkdir()
    remove_abandoned(tmp_path, "")
    assert list(tmp_path.iterdir()) == [own]


@pytest.mark.medium("test_only_folders_of_ended_processes_are_swept")
def test_temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _abandoned(tmp_path, "")
    (tmp_path / "lorac-mine").mkdir()
    folder = make_temporary_folder()
    assert set(tmp_path.iterdir()) == {folder, tmp_path / "lorac-mine"}

    class Owner:
        """An owner of a folder."""

    owner = Owner()
    remove_with_owner(owner, folder)
    assert folder.is_dir()
    del owner
    gc.collect()
    assert not folder.exists()


def test_a_forked_child_leaves_its_parents_folder(tmp_path: Path) -> None:
    script = """
import os, sys
from lorac.storage.process_folders import make_temporary_folder, remove_with_owner
class Owner: pass
owner, folder = Owner(), make_temporary_folder()
remove_with_owner(owner, folder)
if os.fork() == 0:
    if sys.argv[1:]: del owner
    sys.exit(0)
assert os.wait()[1] == 0
assert folder.is_dir()
"""
    run_python(script, TMPDIR=str(tmp_path))
    run_python(script.replace("sys.argv[1:]", "True"), TMPDIR=str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.medium("folders of ended processes by /proc")
def test_finds_abandoned_folders_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda path: False)
    own = make_process_folder(tmp_path, "")
    assert own.name.split("-")[3] == "0"
    remove_abandoned(tmp_path, "")
    assert own.is_dir()
    name = _abandoned(tmp_path, "").name.split("-")
    shutil.rmtree(tmp_path / "-".join(name))
    (tmp_path / "-".join([*name[:3], "0", name[4]])).mkdir()
    remove_abandoned(tmp_path, "")
    assert list(tmp_path.iterdir()) == [own]
