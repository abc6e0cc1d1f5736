"""The library of lorac-native, built from its sources once for all tests and kept in ``build/native``."""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lorac.native_library import find_native_library

ROOT = Path(__file__).parents[2]
SOURCES, BUILD = ROOT / "native", ROOT / "build" / "native"
PACKAGE = "lorac_native"
_COMPILERS = ("c++", "g++", "clang++")

needs_compiler = pytest.mark.skipif(
    shutil.which("cmake") is None or not any(map(shutil.which, _COMPILERS)),
    reason="lorac-native is built by CMake and a C++ compiler, and they are not here",
)


def build(folder: Path, *options: str) -> Path:
    """Build the sources in a folder, what changed since the last time; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for arguments in (
            ["-S", str(SOURCES), "-B", str(folder), *options],
            ["--build", str(folder), "--parallel", "2"],
        ):
            subprocess.run(["cmake", *arguments], check=True, capture_output=True, text=True)
    return folder


def build_package() -> Path:
    """Return a folder with the package ``lorac_native``, as its wheel holds it."""
    package = build(BUILD) / "package" / PACKAGE
    package.mkdir(parents=True, exist_ok=True)
    for file in (SOURCES / PACKAGE / "__init__.py", BUILD / "liblorac_native.so"):
        if not (package / file.name).exists() or file.stat().st_mtime > (package / file.name).stat().st_mtime:
            shutil.copy2(file, package / f"{file.name}.new")
            (package / f"{file.name}.new").replace(package / file.name)
    return package.parent


@contextmanager
def installed(folder: Path | None) -> Iterator[None]:
    """Have lorac find the package in a folder, or none."""
    path, known = list(sys.path), sys.modules.pop(PACKAGE, None)
    sys.path[:] = [*([] if folder is None else [str(folder)]), *path]
    if folder is None:
        sys.modules[PACKAGE] = None  # type: ignore[assignment]  # an import of it fails
    find_native_library.cache_clear()
    try:
        yield
    finally:
        sys.path[:] = path
        sys.modules.pop(PACKAGE, None)
        if known is not None:
            sys.modules[PACKAGE] = known
        find_native_library.cache_clear()
