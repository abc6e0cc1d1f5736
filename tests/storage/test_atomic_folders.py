"""A file or folder changes in one step or not at all, and files of others in it stay."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorac import FormatError
from lorac.storage import atomic_folders as folders
from lorac.storage.atomic_folders import list_foreign, read_consistently, recover_folder, replace_atomically
from tests.refusing import refuses

CHANGES = ("os.rename", "os.replace", "os.link", "lorac.storage.atomic_folders._exchange_in_one_step")


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=[True, False], ids=["exchanged", "renamed"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways in which folders change places."""
    if not request.param:
        monkeypatch.setattr(folders, "_exchange_in_one_step", lambda one, other: False)
    return bool(request.param)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


@pytest.mark.parametrize("before", [None, {}, {"a": "old", "more/b": "old"}])
def test_replaces_a_folder(before: dict[str, str] | None, exchange: bool, target: Path) -> None:
    if before is not None:
        target.mkdir()
        fill(target, before)
    with replace_atomically(target, contents) as staged:
        fill(staged, {"a": "new", "c": "new"})
        assert not target.exists() if before is None else contents(target) == before
    assert contents(target) == {"a": "new", "c": "new"}
    assert os.listdir(target.parent) == ["target"]


def test_syncs_files_and_new_folders(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file, every folder made, and the entry of each in the one above it."""
    flushed, honest = set(), os.fsync

    def note(handle: int) -> None:
        flushed.add(os.fstat(handle).st_ino)
        honest(handle)

    monkeypatch.setattr(os, "fsync", note)
    deep = target / "one" / "two" / "it"
    with replace_atomically(deep) as staged:
        fill(staged, {"a": "new", "more/b": "new"})
    written = [target.parent, target, *target.rglob("*")]
    assert {
        path.relative_to(target.parent).as_posix() for path in written if path.stat().st_ino not in flushed
    } == set()


def test_an_empty_folder_that_is_there_keeps_its_permissions(target: Path) -> None:
    target.mkdir(mode=0o700)
    with replace_atomically(target) as staged:
        fill(staged, {"a": "new"})
    assert contents(target) == {"a": "new"}
    assert stat.S_IMODE(target.stat().st_mode) == 0o700


def test_replaces_a_file_through_links(target: Path) -> None:
    for text in ("one", "two"):
        with replace_atomically(target.parent / "deep" / "file") as staged:
            staged.write_text(text)
        assert (target.parent / "deep" / "file").read_text() == text
    target.symlink_to("deep/file")
    with replace_atomically(target) as staged:
        staged.write_text("three")
    assert target.is_symlink()
    assert (target.parent / "deep" / "file").read_text() == "three"
    assert os.listdir(target.parent / "deep") == ["file"]


def test_keeps_files_of_others(exchange: bool, target: Path) -> None:
    """The same files, not copies; links, empty folders and permissions too."""
    fill(target, {"a": "old", "gone": "old", "readme": "mine", "deep/er/notes": "mine", "deep/gone": "old"})
    (target / "empty" / "folder").mkdir(parents=True)
    (target / "link").symlink_to("readme")
    (target / "broken").symlink_to("nowhere")
    (target / "linked").symlink_to("deep")
    os.mkfifo(target / "pipe")
    (target / "deep").chmod(0o700)
    target.chmod(0o770)
    same = (target / "readme").stat().st_ino
    with replace_atomically(target, lambda folder: {"gone", "deep/gone"}) as staged:
        fill(staged, {"a": "new", "deep/b": "new"})
    found = {"a": "new", "readme": "mine", "deep/er/notes": "mine", "deep/b": "new"}
    assert contents(target) == {**found, "link": "mine"}
    assert (target / "empty" / "folder").is_dir()
    assert (target / "link").readlink() == Path("readme")
    assert (target / "broken").readlink() == Path("nowhere")
    assert (target / "linked").readlink() == Path("deep")
    assert stat.S_ISFIFO((target / "pipe").lstat().st_mode)
    assert (target / "readme").stat().st_ino == same
    assert stat.S_IMODE((target / "deep").stat().st_mode) == 0o700
    assert stat.S_IMODE(target.stat().st_mode) == 0o770
    assert os.listdir(target.parent) == ["target"]


def test_copies_files_where_links_are_not_supported(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    fill(target, {"a": "old", "deep/readme": "mine"})
    with replace_atomically(target) as staged:
        fill(staged, {"a": "new"})
    assert contents(target) == {"a": "new", "deep/readme": "mine"}


def test_keeps_changes_made_during_the_exchange(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program writes into the folder in the last moment before it is displaced."""
    fill(target, {"a": "old", "log": "1", "replaced": "1", "readme": "mine"})
    honest = folders._exchange_in_one_step

    def late(one: Path, other: Path) -> bool:
        fill(other, {"log": "1 2", "more/late": "mine", "new": "mine"})
        fill(other, {"aside": "2"})
        os.replace(other / "aside", other / "replaced")
        return honest(one, other)

    monkeypatch.setattr(folders, "_exchange_in_one_step", late)
    with replace_atomically(target) as staged:
        fill(staged, {"a": "new"})
    assert contents(target) == {
        "a": "new", "log": "1 2", "replaced": "2", "readme": "mine", "more/late": "mine", "new": "mine",
    }  # fmt: skip
    assert os.listdir(target.parent) == ["target"]


def failing(change: Callable[..., Any], at: list[int]) -> Callable[..., Any]:
    def step(*arguments: Any, **options: Any) -> Any:
        at[0] -= 1
        if at[0] == 0:
            raise OSError(errno.ENOSPC, "the disk is full")
        return change(*arguments, **options)

    return step


@pytest.mark.parametrize("moment", range(1, 9))
def test_a_failed_step_changes_nothing(
    moment: int, exchange: bool, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever step fails; a link that fails is a copy."""
    before = {"a": "old", "readme": "mine", "deep/notes": "mine"}
    fill(target, before)
    left = [moment]
    for name in CHANGES:
        owner, _, leaf = name.rpartition(".")
        holder = os if owner == "os" else folders
        monkeypatch.setattr(holder, leaf, failing(getattr(holder, leaf), left))
    try:
        with replace_atomically(target) as staged:
            fill(staged, {"a": "new", "b": "new"})
    except OSError as error:
        assert error.errno == errno.ENOSPC
        assert contents(target) == before
    else:
        assert contents(target) == {**before, "a": "new", "b": "new"}
    assert os.listdir(target.parent) == ["target"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_in_the_block_changes_nothing(error: type[BaseException], target: Path) -> None:
    fill(target, {"a": "old"})
    with pytest.raises(error), replace_atomically(target) as staged:
        fill(staged, {"a": "new"})
        raise error
    assert contents(target) == {"a": "old"}
    assert os.listdir(target.parent) == ["target"]


def test_rejects_replacing_a_file_by_a_folder(target: Path) -> None:
    fill(target, {"a": "old"})
    with pytest.raises(IsADirectoryError), replace_atomically(target) as staged:
        staged.write_text("new")
    with pytest.raises(NotADirectoryError), replace_atomically(target / "a") as staged:
        fill(staged, {"b": "new"})
    assert contents(target) == {"a": "old"}


def test_rejects_a_mount_point_before_anything_is_written(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == target)
    with pytest.raises(OSError, match="mount point"), replace_atomically(target):
        raise AssertionError("the block ran")


def test_foreign(target: Path) -> None:
    fill(target, {"a": "", "b": "", "c/d": "", "c/e": ""})
    (target / "f").mkdir()
    assert list_foreign(target, {"a", "c/d"}) == ["b", "c/e", "f"]
    assert list_foreign(target, {"a", "b", "c/d", "c/e"}) == ["f"]


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_recover_leaves_whole_and_missing_folders(target: Path) -> None:
    recover_folder(target)
    recover_folder(target / "deeper" / "still")
    assert not os.listdir(target.parent)
    fill(target, {"a": "old"})
    recover_folder(target)
    assert contents(target) == {"a": "old"}


def test_retries_a_read_during_a_replacement(target: Path) -> None:
    target.write_text("0")
    count = 0

    def read() -> str:
        nonlocal count
        count += 1
        if count < 4:
            with replace_atomically(target) as staged:
                staged.write_text(str(count))
            raise FormatError("a mixture", code="corrupt_file")
        return target.read_text()

    assert read_consistently(target, read) == "3"


def test_an_error_that_nothing_else_explains_is_raised_at_once(target: Path) -> None:
    target.write_text("0")
    count = 0

    def read() -> None:
        nonlocal count
        count += 1
        raise FormatError("damaged", code="corrupt_file")

    with refuses("corrupt_file"):
        read_consistently(target, read)
    assert count == 1


def test_retries_a_read_of_a_missing_folder(target: Path) -> None:
    """A folder may have come and gone between the two looks."""
    count = 0

    def read() -> int:
        nonlocal count
        count += 1
        if count == 1:
            raise FormatError("a part of it is missing", code="corrupt_file")
        return count

    assert read_consistently(target, read) == 2
