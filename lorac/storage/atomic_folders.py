"""Atomic replacement of files and folders: a reader sees the old or the new content.

A writer prepares the new content in a workshop, a hidden folder next to the target, flushes it to disk, and moves it
into place by one system call: ``rename``, or Linux' ``renameat2`` with ``RENAME_EXCHANGE`` for a folder that replaces
another. A writer that is killed leaves the old or the new content, and may leave its workshop, whose name says which
process made it. The next write to the same target removes the workshop once that process has ended.

Where the system cannot exchange folders, three renames through the workshop do it. A writer that is killed between them
leaves no target, and the old folder in its workshop. ``recover_folder``, which every reader and writer calls first,
moves it back.

Windows cannot lock folders, so two simultaneous writers of one folder may leave a mixture of their files. It refuses to
replace or move files that are open or mapped, such as a loaded artifact's: writing then fails, and the old content
stays.

A writer states which files of a folder are its own. All others are kept: they are linked into the new folder before it
takes the old one's place, and files that appeared or changed meanwhile are transferred afterwards.
"""

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
from lorac.storage.process_folders import find_process_folders, make_process_folder, remove_abandoned

MANIFEST = "manifest.json"
"""The file by which the folder of a compiled model is recognised."""

T = TypeVar("T")
OwnedFiles = Callable[[Path], Collection[str]]
"""Return the names of the files in a folder that a writer may replace or remove, relative to it and with slashes."""
_Stamp = tuple[int, ...]
_NEW, _OLD, _LINK = "new", "old", "link"
"""Names in a workshop: the new content (after the exchange, the old one), the target while three renames exchange it,
and a file before it moves into a folder."""
_TRIES = 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_CANNOT_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP}


@contextlib.contextmanager
def replace_atomically(target: Path, owned: OwnedFiles = lambda _: ()) -> Iterator[Path]:
    """Yield a path for a new file or folder, which replaces the target when the block ends.

    If the block or the move fails, nothing changes.

    Args:
        target: the path to replace; links are followed, and missing folders above it are created.
        owned: returns the writer's own files in the old folder, which are removed. All other files are kept, unless
            the new folder has a file of the same name.

    Raises:
        OSError: the disk fails; or the target is a mount point, or contains the process's working directory, neither
            of which can be replaced.
    """
    target = Path(os.path.realpath(target))
    if os.path.ismount(target):  # unlike Path.is_mount, it tolerates that a folder disappears meanwhile
        raise OSError(errno.EBUSY, "nothing can take the place of a mount point, give a path below it", str(target))
    here = Path("/")
    with contextlib.suppress(OSError):  # the process's folder was removed
        here = Path(os.path.realpath(os.getcwd()))
    if target.is_dir() and here.is_relative_to(target):
        raise OSError(errno.EBUSY, "this process works in that folder, give a path below it", str(target))
    missing = [path for path in (target.parent, *target.parent.parents) if not path.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for made in missing:
        flush(made.parent)
    with locked_folder(target.parent):
        _move_back(target)
        remove_abandoned(target.parent, _mark(target))
    workshop = make_process_folder(target.parent, _mark(target))
    try:
        staged = workshop / _NEW
        yield staged
        flush_folder(staged)
        with locked_folder(target.parent):
            _move_back(target)
            _install(staged, target, owned)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def list_foreign(folder: Path, owned: Collection[str]) -> list[str]:
    """List the entries of a folder besides the named files: files, links and empty folders, sorted by name."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in owned and (not _is_folder(path) or not any(path.iterdir())):
            found.append(name)
    return found


def _install(staged: Path, target: Path, owned: OwnedFiles) -> None:
    if staged.is_dir() and target.is_dir():
        written = list_foreign(staged, ())
        through = staged.with_name(_LINK)
        transferred = _transfer(target, staged, through, {*owned(target), *written}, {})
        _exchange(staged, target)
        try:
            _transfer(staged, target, through, {*owned(staged), *written}, transferred)
        except BaseException:
            _exchange(staged, target)
            raise
        flush(staged.parent)
    else:
        os.replace(staged, target)
    flush(target.parent)


def _transfer(
    source: Path, into: Path, through: Path, without: Collection[str], earlier: Mapping[str, _Stamp]
) -> dict[str, _Stamp]:
    """Link the foreign files of one folder into another, and copy its folders' permissions.

    Args:
        source: the folder with the files.
        into: the folder that gets the links.
        through: a path in a workshop.
        without: names of the files in ``source`` that are not foreign.
        earlier: result of an earlier call; unchanged files are not linked again.
    """
    found: dict[str, _Stamp] = {}
    for name in list_foreign(source, without):
        status = (source / name).lstat()
        found[name] = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    for name, stamp in found.items():
        if earlier.get(name) != stamp:
            _link(source / name, into / name, through)
    for path in [source, *source.rglob("*")]:
        twin = into / path.relative_to(source)
        if _is_folder(path) and _is_folder(twin):
            shutil.copymode(path, twin)
            flush(twin)
    return found


def _link(source: Path, place: Path, through: Path) -> None:
    """Hard-link a file to another path; copy it where the file system or the file's owner does not allow links."""
    if _is_folder(source):
        place.mkdir(parents=True, exist_ok=True)
        return
    if os.path.lexists(place) and os.path.samestat(source.lstat(), place.lstat()):
        return  # linked earlier, and written to since
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, through, follow_symlinks=False)
    except FileExistsError:  # a copy would overwrite another writer's file
        raise
    except (OSError, NotImplementedError):
        shutil.copy2(source, through, follow_symlinks=False)
        flush(through)
    os.replace(through, place)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def flush_folder(path: Path) -> None:
    """Flush a folder, or a file, and everything in it to disk."""
    for inner in [path, *path.rglob("*")]:
        flush(inner)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    if path.is_symlink() or not (path.is_file() or (path.is_dir() and sys.platform != "win32")):
        return
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)  # Windows flushes writable files
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _exchange(one: Path, other: Path) -> None:
    """Exchange two folders, the first of which is in a workshop."""
    if _exchange_in_one_step(one, other):
        return
    through = one.with_name(_OLD)
    with contextlib.ExitStack() as undo:
        for source, place in ((other, through), (one, other), (through, one)):
            os.rename(source, place)
            undo.callback(os.rename, place, source)
        undo.pop_all()


def _exchange_in_one_step(one: Path, other: Path) -> bool:
    """Exchange two folders by one system call; return False where that is not possible."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, TypeError):  # an older C library, or another system's
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Lock a folder, where the file system has locks; the system releases the lock of a killed process."""
    with contextlib.ExitStack() as unlock:
        if sys.platform != "win32":
            import fcntl

            with contextlib.suppress(OSError):  # the file system has no locks
                handle = os.open(folder, os.O_RDONLY)
                unlock.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _mark(target: Path) -> str:
    return f".{target.name}."


def recover_folder(path: Path) -> None:
    """Move a folder back to its path if a killed writer left it in a workshop.

    Every reader of a folder calls this first; it usually costs one ``stat`` of the path.
    """
    if os.path.exists(path):
        return
    path = Path(os.path.realpath(path))
    if os.path.lexists(path) or not path.parent.is_dir():
        return
    with locked_folder(path.parent):
        _move_back(path)


def _move_back(target: Path) -> None:
    """Move a folder back; the caller holds the lock, so that no running writer is between its renames."""
    if os.path.lexists(target):
        return
    for workshop in find_process_folders(target.parent, _mark(target)):
        if os.path.lexists(workshop / _OLD):
            os.rename(workshop / _OLD, target)
            return


def read_consistently(path: Path, read: Callable[[], T]) -> T:
    """Read a file or folder; if a read fails and the path was replaced meanwhile, read again.

    Args:
        path: the file or folder.
        read: reads it, and raises if its parts do not belong together.
    """
    for _ in range(_TRIES):
        recover_folder(path)
        before = _identity(path)
        try:
            return read()
        except (LoracError, OSError) as error:
            failed = error
        if (
            before is not None and _identity(path) == before
        ):  # without a path before, one may have appeared and vanished
            raise failed
    return read()


def _identity(path: Path) -> _Stamp | None:
    """Return a key that distinguishes this file or folder from earlier and later ones at its path."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino, found.st_ctime_ns
    return None
