"""Folders whose names say which process made them, so that later processes can remove a killed process's folders.

Their names are ``<mark>lorac-<host>-<process>-<start>-<random>``. Process ids are reused, and machines may share a
folder. So a folder counts as abandoned only if this host knows that its process has ended. Windows does not report
that, so the folders of killed processes stay there.
"""

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

_NAME = re.compile(r"lorac-[0-9a-f]{8}-\d+-\d+-\w{8}", re.ASCII)
_UNKNOWN = "0"
"""Start of a process on systems that do not report it."""


def make_process_folder(parent: Path, mark: str) -> Path:
    """Create an empty folder for this process, whose name begins with ``mark``; only its user may read it."""
    process = os.getpid()
    prefix = f"{mark}lorac-{_host()}-{process}-{_started(process)}-"
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


def find_process_folders(parent: Path, mark: str) -> Iterator[Path]:
    """Yield the folders with the mark, of any process."""
    for path in sorted(parent.iterdir()):
        if path.name.startswith(mark) and _NAME.fullmatch(path.name, len(mark)) and not path.is_symlink():
            yield path


def remove_abandoned(parent: Path, mark: str) -> None:
    """Remove the folders with the mark whose process has ended."""
    for path in find_process_folders(parent, mark):
        _, host, process, start, _ = path.name[len(mark) :].split("-")
        if host == _host() and _started(int(process)) != start:
            shutil.rmtree(path, ignore_errors=True)


def make_temporary_folder() -> Path:
    """Create an empty folder for temporary files, and remove the temporary folders of killed processes."""
    parent = Path(tempfile.gettempdir())
    remove_abandoned(parent, "")
    return make_process_folder(parent, "")


def remove_with_owner(owner: object, folder: Path) -> None:
    """Remove a folder when an object is collected or this process ends; a forked child does not remove it."""
    weakref.finalize(owner, _remove, folder, os.getpid())


def _remove(folder: Path, process: int) -> None:
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


def _host() -> str:
    return blake2b(platform.node().encode(), digest_size=4).hexdigest()


def _started(process: int) -> str | None:
    """Return the start time of a process in the system's units; None if it has ended."""
    if Path("/proc/self/stat").is_file():
        try:
            text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return None
        state, *fields = text.rpartition(")")[2].split()  # the command before it may contain anything
        return None if state in "ZX" else fields[18]
    try:
        if sys.platform != "win32":  # there, sending signal 0 ends a process
            os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:  # the process is another user's
        pass
    return _UNKNOWN
