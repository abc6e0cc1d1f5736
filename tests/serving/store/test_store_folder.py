"""A store that is killed at any step has an adapter or does not, and nothing that it cannot use is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from lorac.errors import ArtifactError
from lorac.serving.store.store_folder import StoredName, StoreFolder
from tests.storage.kills import killed_at

STEPS = ("replace", "rename", "unlink", "mkdir", "open", "rmdir")
DIGEST, OTHER = 32 * "a", 32 * "b"
ENTRY, SECOND = StoredName("t", "mine", DIGEST), StoredName("t", "again", DIGEST)


def add(folder: StoreFolder) -> None:
    with folder.workshop() as work:
        (work / "staged").write_bytes(b"whole")
        folder.place("t", DIGEST, work / "staged")
    folder.add_name(ENTRY)


def remove(folder: StoreFolder) -> None:
    folder.remove_name(ENTRY)
    folder.discard("t", DIGEST)


def is_killed(moment: int, path: Path, work: Callable[[StoreFolder], None]) -> bool:
    """Work in a child that is killed before the ``moment``-th call that changes the disk; return whether it was."""
    child = os.fork()
    if not child:
        _die_at(moment)
        work(StoreFolder(path))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


def _die_at(moment: int) -> None:
    dying = killed_at(moment)
    for name in STEPS:
        setattr(os, name, dying(getattr(os, name)))


def found(path: Path) -> list[str]:
    """The names in a folder after a restart, each with a whole file, and nothing else there."""
    folder = StoreFolder(path)
    names = folder.scan()
    assert all(folder.file_of("t", entry.digest).read_bytes() == b"whole" for entry in names)
    folder.close()
    files = [file for file in (path / "adapters").rglob("*") if file.is_file()]
    assert len(files) == len(names) + len({entry.digest for entry in names})
    assert [file.name for file in path.iterdir() if file.name.startswith(".work")] == []
    return [entry.name for entry in names]


@pytest.mark.medium("storage/test_killed.py kills writers of folders")
def test_adding_and_removing_are_atomic(tmp_path: Path) -> None:
    seen = set()
    for work, before, after in ((add, [], ["mine"]), (remove, ["mine"], [])):
        moment, killed = 0, True
        while killed:
            moment += 1
            path = tmp_path / f"{work.__name__}{moment}"
            folder = StoreFolder(path)
            if before:
                add(folder)
            folder.close()
            killed = is_killed(moment, path, work)
            names = found(path)
            assert names in ([before, after] if killed else [after])
            seen.add((work.__name__, *names))
    assert seen == {("add",), ("add", "mine"), ("remove",), ("remove", "mine")}


def test_rejects_a_tenant_whose_folder_is_anothers_where_case_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = StoreFolder(tmp_path)
    add(folder)
    assert folder.file_of("T", DIGEST).parent.name == "T"  # here the file system tells them apart
    exists = os.path.exists
    monkeypatch.setattr(Path, "exists", lambda path: exists(path.with_name(path.name.lower())))
    for find in (lambda: folder.file_of("T", DIGEST), lambda: folder.place("T", DIGEST, tmp_path / "staged")):
        with pytest.raises(ArtifactError, match="tenant 'T' and another differ by case alone") as refused:
            find()
        assert refused.value.next_step == "give the tenant another name"
    assert folder.file_of("t", DIGEST).is_file()


def test_rejects_a_folder_that_another_store_uses(tmp_path: Path) -> None:
    folder = StoreFolder(tmp_path)
    with pytest.raises(ArtifactError, match="another store uses"):
        StoreFolder(tmp_path)
    folder.close()
    StoreFolder(tmp_path).close()


def test_keeps_one_adapter_per_name(tmp_path: Path) -> None:
    folder = StoreFolder(tmp_path)
    add(folder)
    folder.add_name(SECOND)
    folder.add_name(StoredName("t", "mine", OTHER))
    assert folder.scan() == [SECOND, StoredName("t", "mine", OTHER)]
