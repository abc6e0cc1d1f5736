"""Files and folders that change in one step: what is on disk is one thing or the other.

What is written is put together in a workshop beside its target, a hidden folder on the same file system; it is flushed
to disk and then moved into place by one system call: ``rename``, or where a folder takes the place of another Linux'
``renameat2`` with ``RENAME_EXCHANGE``. Killed at any moment, a writer leaves its target as it was or as it was to be.
What may stay behind is the workshop; its name says which process made it, and the next write to the same target
removes it once that process has ended.

Where folders cannot be exchanged (another system, or a file system without it) they change places by three renames
through the workshop. Killed between them, a writer leaves no target, and the old folder whole in its workshop:
``recover``, with which all reading and writing begins, moves it back.

Whoever writes says which files of a folder are its own. All others stay: they are linked into the new folder before it
takes the old one's place, and what appeared or changed meanwhile is brought over afterwards.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from lorac.errors import LoracError
from lorac.storage import process_folders as owners

if sys.platform != "win32":
    import fcntl

MANIFEST = "manifest.json"
"""The file that the folder of a compiled model is known by."""

T = TypeVar("T")
OwnedFiles = Callable[[Path], Collection[str]]
"""(folder) -> names of the files in it that a writer may replace or remove, with slashes, from the folder on."""
_Stamp = tuple[int, ...]
_NEW, _OLD, _LINK = "new", "old", "link"
"""What lies in a workshop: what takes the target's place (then what it displaced), the target on its way through where
folders cannot be exchanged, and a file on its way into a folder."""
_TRIES = 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


# ── Writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
@contextlib.contextmanager
def replace_atomically(target: Path, owned: OwnedFiles = lambda _: ()) -> Iterator[Path]:
    """A path to write a file or a new folder to; when the block ends, what is there takes the target's place.

    Where the block or the move fails, everything is as before.

    Args:
        target: where it goes, links followed; the folders above it are made.
        owned: asked of the folder at the target's place: its own files go with it, and those that the new folder has
            too are replaced. All others are kept.

    Raises:
        OSError: the disk's; also where the target is a mount point, since nothing can take its place.
    """
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):  # unlike Path.is_mount, it bears that a folder goes away meanwhile
        raise OSError(errno.EBUSY, "nothing can take the place of a mount point, give a path below it", str(target))
    _make_folder(target.parent)
    with _alone(target.parent):
        _move_back(target)
        owners.remove_abandoned(target.parent, _mark(target))
    workshop = owners.make_process_folder(target.parent, _mark(target))
    try:
        staged = workshop / _NEW
        yield staged
        for path in [staged, *staged.rglob("*")]:
            _flush(path)
        with _alone(target.parent):
            _move_back(target)
            _install(staged, target, owned)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def list_foreign(folder: Path, owned: Collection[str]) -> list[str]:
    """What lies in a folder besides the files named: names of files, links, and folders that hold nothing, sorted."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in owned and (not _is_folder(path) or not any(path.iterdir())):
            found.append(name)
    return found


def _make_folder(folder: Path) -> None:
    """Make a folder and those above it, each on disk as an entry of the one above."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _flush(made.parent)


def _install(staged: Path, target: Path, owned: OwnedFiles) -> None:
    """Move into place what is staged, and is on disk."""
    if staged.is_dir() and target.is_dir():
        _take_over(staged, target, owned)
    else:
        os.replace(staged, target)
    _flush(target.parent)


def _take_over(staged: Path, target: Path, owned: OwnedFiles) -> None:
    """Let a new folder take the place of an older one, with all that is foreign in that one."""
    written = list_foreign(staged, ())
    through = staged.with_name(_LINK)
    brought = _bring(target, staged, through, {*owned(target), *written}, {})
    _exchange(staged, target)
    try:
        _bring(staged, target, through, {*owned(staged), *written}, brought)
    except BaseException:
        _exchange(staged, target)
        raise
    _flush(staged.parent)


def _bring(
    source: Path, into: Path, through: Path, without: Collection[str], brought: Mapping[str, _Stamp]
) -> dict[str, _Stamp]:
    """Make all that is foreign to one folder be in another too, and its folders' permissions the same.

    Args:
        source: the one.
        into: the other.
        through: a path in a workshop.
        without: names of the files in ``source`` that are not foreign.
        brought: what an earlier call returned; files that are still those it saw are not brought again.
    """
    found = {name: _stamp(source / name) for name in list_foreign(source, without)}
    for name, stamp in found.items():
        if brought.get(name) != stamp:
            _link(source / name, into / name, through)
    for path in [source, *source.rglob("*")]:
        twin = into / path.relative_to(source)
        if _is_folder(path) and _is_folder(twin):
            shutil.copymode(path, twin)
            _flush(twin)
    return found


def _link(source: Path, place: Path, through: Path) -> None:
    """Make a file be at another place too: itself, or a copy where the file system, or its owner, allows no link."""
    if _is_folder(source):
        place.mkdir(parents=True, exist_ok=True)
        return
    if os.path.lexists(place) and os.path.samestat(source.lstat(), place.lstat()):
        return  # linked before, and written to since
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, through, follow_symlinks=False)
    except FileExistsError:  # a copy would write into somebody's file
        raise
    except (OSError, NotImplementedError):
        shutil.copy2(source, through, follow_symlinks=False)
        _flush(through)
    os.replace(through, place)


def _stamp(path: Path) -> _Stamp:
    """What changes when a file is written to, or another one takes its place."""
    found = path.lstat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _flush(path: Path) -> None:
    """Have a file's contents, or a folder's entries, on disk."""
    if path.is_symlink() or not (path.is_file() or (path.is_dir() and sys.platform != "win32")):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ── Changing places ──────────────────────────────────────────────────────────────────────────────────────────────────
def _exchange(one: Path, other: Path) -> None:
    """Let two folders change places, of which the first lies in a workshop."""
    if _exchanged(one, other):
        return
    through = one.with_name(_OLD)
    with contextlib.ExitStack() as undo:
        for source, place in ((other, through), (one, other), (through, one)):
            os.rename(source, place)
            undo.callback(os.rename, place, source)
        undo.pop_all()


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where that cannot be done."""
    if sys.platform != "linux":
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # a C library without it
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process or thread at a time, where the file system keeps locks; the system lets go for one that is killed."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError):
            _lock(folder, held)
        yield


def _lock(folder: Path, held: contextlib.ExitStack) -> None:
    """Take the folder's lock for as long as ``held`` is open; there are none on Windows."""
    if sys.platform != "win32":
        handle = os.open(folder, os.O_RDONLY)
        held.callback(os.close, handle)
        fcntl.flock(handle, fcntl.LOCK_EX)


def _mark(target: Path) -> str:
    return f".{target.name}."


# ── Reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def recover_folder(path: Path) -> None:
    """Move a folder back that a writer was killed over, where it could not exchange it with its own.

    Whatever reads a folder by its path calls this first; it costs a look at the path.
    """
    path = Path(os.path.realpath(path))
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    with _alone(path.parent):
        _move_back(path)


def _move_back(target: Path) -> None:
    """As ``recover``, by one who is alone: then no writer is between its renames, and what lies there was left."""
    if os.path.lexists(target):
        return
    for workshop in owners.find_process_folders(target.parent, _mark(target)):
        if os.path.lexists(workshop / _OLD):
            os.rename(workshop / _OLD, target)
            return


def read_consistently(path: Path, read: Callable[[], T]) -> T:
    """What reading a file or folder gives; read again where that fails while another one takes its place.

    Args:
        path: what is read.
        read: notices by itself when parts of what it read do not belong together.
    """
    for _ in range(_TRIES):
        recover_folder(path)
        before = _identity(path)
        try:
            return read()
        except (LoracError, OSError) as error:
            failed = error
        if before is not None and _identity(path) == before:  # where nothing was, something may have come and gone
            raise failed
    return read()


def _identity(path: Path) -> _Stamp | None:
    """What no other file or folder has at the same place, at this time or another."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns
