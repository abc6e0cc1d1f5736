"""Folders that belong to a process: their names say which, so that what a killed one left behind can be told and swept.

A name is ``<mark>lorac-<host>-<process>-<start>-<random>``. Numbers of processes are used again, and a folder may be
shared between machines: only where this host knows for certain that the process has ended is its folder abandoned.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

_NAME = re.compile(r"lorac-([0-9a-f]{8})-(\d+)-(\d+)-\w{8}", re.ASCII)
_UNKNOWN = "0"
"""The start of a process where the system does not tell."""


def make_process_folder(parent: Path, mark: str) -> Path:
    """An empty folder of this process's, whose name begins with ``mark``; for its user alone."""
    process = os.getpid()
    prefix = f"{mark}lorac-{_host()}-{process}-{_started(process)}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def find_process_folders(parent: Path, mark: str) -> Iterator[Path]:
    """The folders that ``new_folder`` made there with that mark, in whatever process."""
    for path in sorted(parent.iterdir()):
        if path.name.startswith(mark) and _NAME.fullmatch(path.name, len(mark)) and not path.is_symlink():
            yield path


def remove_abandoned(parent: Path, mark: str) -> None:
    """Remove the folders with that mark whose process has ended."""
    for path in find_process_folders(parent, mark):
        if _is_abandoned(path.name, mark):
            shutil.rmtree(path, ignore_errors=True)


def make_temporary_folder() -> Path:
    """An empty folder for temporary files; those that killed processes left are removed first."""
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent, "")
    return make_process_folder(parent, "")


def remove_with_owner(owner: object, folder: Path) -> None:
    """Remove a folder once an object is let go or this process ends; a forked child leaves it alone."""
    weakref.finalize(owner, _remove, folder, os.getpid())


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(name: str, mark: str) -> bool:
    found = _NAME.fullmatch(name, len(mark))
    assert found is not None
    host, process, start = found.groups()
    return host == _host() and _started(int(process)) != start


def _host() -> str:
    return blake2b(platform.node().encode(), digest_size=4).hexdigest()


def _started(process: int) -> str | None:
    """When a process began, as the system counts; None once it has ended."""
    if Path("/proc/self/stat").is_file():
        return _told_by_linux(process)
    if sys.platform == "win32":  # there, sending signal 0 ends a process
        return _UNKNOWN
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:  # another user's
        return _UNKNOWN
    return _UNKNOWN


def _told_by_linux(process: int) -> str | None:
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # the command before it may hold anything
    state, start = fields[0], fields[19]
    return None if state in "ZX" else start
