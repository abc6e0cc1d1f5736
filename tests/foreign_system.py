"""A process that lacks what Windows or macOS lacks: modules of POSIX, names in ``os``, /proc.

``become`` is called before lorac is imported. Libraries are imported before that: they know those systems, and are not
what is tested.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import ctypes
import errno
import importlib
import importlib.abc
import importlib.machinery
import io
import mmap
import os
import select
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TextIO

ROOT = Path(__file__).parents[1]
POSIX_MODULES = frozenset({"fcntl", "grp", "pwd", "pty", "resource", "syslog", "termios", "tty"})
POSIX_NAMES = {
    os: "fork forkpty killpg getpgid getpgrp setsid getuid geteuid getgid getegid nice chown fchown mkfifo mknod "
    "sysconf sysconf_names pathconf fpathconf statvfs fstatvfs uname getloadavg sched_getaffinity pread pwrite preadv "
    "pwritev sendfile posix_fadvise posix_fallocate memfd_create wait wait3 wait4 O_NOFOLLOW O_CLOEXEC O_NOCTTY "
    "O_NONBLOCK O_DIRECTORY O_SYNC O_DSYNC WNOHANG",
    signal: "SIGKILL SIGXCPU SIGXFSZ SIGALRM SIGSTOP SIGCONT SIGHUP SIGUSR1 SIGUSR2 SIGQUIT SIGCHLD SIGPIPE SIGTSTP "
    "alarm setitimer pthread_kill pthread_sigmask sigwait",
    select: "poll epoll",
    mmap: "MADV_DONTNEED MADV_WILLNEED MAP_PRIVATE MAP_SHARED PROT_READ PROT_WRITE",
}
"""Names that Python has on Linux and not on Windows."""
LINUX_NAMES = {os: "sched_getaffinity memfd_create posix_fadvise O_DIRECT", select: "epoll"}
"""Names that Python has on Linux and not on macOS."""


class _Absent(importlib.abc.MetaPathFinder):
    """Finds no module of some names."""

    def __init__(self, names: frozenset[str]) -> None:
        self._names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name in self._names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


def modules() -> list[str]:
    """List all modules of lorac."""
    paths = sorted((ROOT / "lorac").rglob("*.py"))
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in paths if path.name != "__main__.py"]
    return [".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts]


def _import_libraries() -> list[str]:
    """Import what lorac's modules import as they are imported themselves; return the libraries that are missing."""
    missing = []
    for path in (ROOT / "lorac").rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [each.name for each in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            for name in [node.module or ""] if isinstance(node, ast.ImportFrom) else names:
                library = name.partition(".")[0]
                if library in ("lorac", *POSIX_MODULES):
                    continue
                try:
                    found = importlib.import_module(name)
                    for each in names if isinstance(node, ast.ImportFrom) else ():
                        getattr(found, each, None)  # some packages import their parts when these are asked for
                except ImportError:
                    missing.append(library)
    return missing


def become(system: str) -> None:
    """Take from this process what a system lacks, and refuse what it refuses.

    Args:
        system: "win32" or "darwin".
    """
    sys.platform = system
    _keep_names_for("filelock")
    for module, names in (POSIX_NAMES if system == "win32" else LINUX_NAMES).items():
        for name in names.split():
            if name in vars(module):
                delattr(module, name)
    if system == "win32":
        _refuse_as_windows()
        os.supports_dir_fd = os.supports_dir_fd - {os.open}
        shutil._use_fd_functions = False  # type: ignore[attr-defined]  # it would ask for the names above
        sys.meta_path.insert(0, _Absent(POSIX_MODULES))
        for name in POSIX_MODULES:
            sys.modules.pop(name, None)
    load = ctypes.CDLL

    def load_library(name: str | None, *args: object, **kwargs: object) -> object:
        """The system's own library is not Linux'."""
        if name is not None:
            return load(name, *args, **kwargs)
        if system == "win32":
            raise TypeError("bad argument type for built-in operation")
        return object()

    ctypes.CDLL = load_library  # type: ignore[assignment,misc]
    _hide_proc()


def _keep_names_for(library: str) -> None:
    """Leave a library, whose choice for this system was made as it was imported, all names of ``os``."""
    whole = ModuleType("os")
    vars(whole).update(vars(os))
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == library and vars(module).get("os") is os:
            vars(module)["os"] = whole


def _refuse_as_windows() -> None:
    """Flush handles that may be written alone, and neither move nor remove files that are open or mapped."""
    import fcntl

    fsync, listdir, readlink = os.fsync, os.listdir, os.readlink

    def flush(handle: int) -> None:
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync(handle)

    def in_use(path: str) -> bool:
        found = [line.split(maxsplit=5)[-1].strip() for line in read("/proc/self/maps").splitlines()]
        for handle in listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                found.append(readlink(f"/proc/self/fd/{handle}"))
        return any(f"{each}/".startswith(f"{path}/") for each in found)

    def read(path: str, open_: Callable[[str], TextIO] = open) -> str:
        with open_(path) as file:
            return file.read()

    def without_open_files(work: Callable[..., None]) -> Callable[..., None]:
        def call(*paths: str | os.PathLike[str], **kwargs: object) -> None:
            for path in paths:
                if "dir_fd" not in kwargs and in_use(os.path.realpath(path)):
                    raise PermissionError(errno.EACCES, "Access is denied", os.fspath(path))
            work(*paths, **kwargs)

        return call

    os.fsync = flush
    for name in ("rename", "replace", "unlink", "remove", "rmdir"):
        setattr(os, name, without_open_files(getattr(os, name)))


def _hide_proc() -> None:
    """Hide /proc from ``Path`` and ``open``."""

    def without_proc(work: Callable[..., object]) -> Callable[..., object]:
        def call(path: object, *args: object, **kwargs: object) -> object:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith("/proc"):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", os.fspath(path))
            return work(path, *args, **kwargs)

        return call

    os.stat, io.open, builtins.open = map(without_proc, (os.stat, io.open, builtins.open))


def main() -> None:
    """Import every module of lorac on a system, and run a function of a module: SYSTEM MODULE FUNCTION ARGUMENT."""
    system, module, function, argument = sys.argv[1:]
    missing = _import_libraries()
    become(system)
    failed = {}
    for name in modules():
        try:
            importlib.import_module(name)
        except Exception as error:
            if getattr(error, "name", None) not in missing:
                failed[name] = f"{type(error).__name__}: {error}"
    assert not failed, failed
    getattr(importlib.import_module(module), function)(argument)


if __name__ == "__main__":
    main()
