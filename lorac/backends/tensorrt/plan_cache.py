"""Plans that were built before, in a folder: found by what they were built from, and checked before they are used.

A plan lies in a file of its own whose name has the key and the hash of its contents. It is written aside and moved
into place in one step; one that is damaged is not used, and one that was not used for longest is removed first where
the folder becomes too large. Nothing else in the folder is touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorac.backends.tensorrt import library
from lorac.errors import FormatError
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.open_file import OpenFile
from lorac.storage.os_errors import translate_os_errors

PLAN, KERNELS = "plan", "kernels"
"""What files of the folder hold."""
_NAME = re.compile(rf"[0-9a-f]{{32}}-[0-9a-f]{{32}}\.(?:{PLAN}|{KERNELS})")
DEFAULT_LIMIT = 8 << 30
"""Bytes that plans may take together, unless a cache is told otherwise."""


def plan_key(program: Iterable[OpenFile], capabilities: Sequence[str], **told_to: object) -> str:
    """The key of a plan: equal where the same would be built.

    Args:
        program: the emitted model and its weights.
        capabilities: what it is built for; empty: for the GPU that is here, which is then part of the key.
        told_to: what the library is told besides, such as profiles and flags: values that ``repr`` tells apart.

    Returns:
        32 hexadecimal digits.
    """
    facts = {
        "program": sorted((held.where.name, held.digest()) for held in program),
        "library": library.name_and_version(),
        "capabilities": sorted(capabilities),
        "gpus": [] if capabilities and library.is_rtx() else current_gpu(),
        "told": {name: repr(_ordered(value)) for name, value in told_to.items()},
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def current_gpu() -> list[str]:
    """The GPU that work goes to now, by its name and compute capability; none where there is none."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    return [f"{torch.cuda.get_device_name()} {major}.{minor}"]


def _ordered(value: object) -> object:
    """A value whose ``repr`` does not depend on the order in which mappings were filled."""
    if isinstance(value, Mapping):
        return sorted((repr(key), repr(_ordered(part))) for key, part in value.items())
    if isinstance(value, list | tuple):
        return [_ordered(part) for part in value]
    return value


@dataclass(frozen=True)
class PlanCache:
    """Plans in a folder.

    Attributes:
        folder: where they lie; made when it is first written to.
        limit: bytes that they may take together.
    """

    folder: Path
    limit: int = DEFAULT_LIMIT

    def plan(self, key: str, build: Callable[[], bytes | memoryview]) -> bytes | memoryview:
        """The plan for a key: from the folder, or built and written there.

        Raises:
            FormatError: the folder cannot be written to.
        """
        found = self.read(key)
        if found is not None:
            return found
        made = build()
        self.write(key, made)
        return made

    def read(self, key: str, kind: str = PLAN) -> bytes | None:
        """What lies there for a key, checked against its hash; None where there is nothing, or nothing whole."""
        for path in self._of(key, kind):
            content = _read(path)
            if content is not None and path.name == _file_name(key, content, kind):
                _touch(path)
                return content
        return None

    def write(self, key: str, content: bytes | memoryview, kind: str = PLAN) -> None:
        """Write what is then found for a key, in the place of what was.

        Raises:
            FormatError: the folder cannot be written to.
        """
        path = self.folder / _file_name(key, content, kind)
        with translate_os_errors(path, FormatError, "written", "unreadable"):
            with replace_atomically(path) as staged:
                staged.write_bytes(content)
            for older in {*self._of(key, kind)} - {path}:
                older.unlink(missing_ok=True)
            self._bound(path)

    def kernels(self, key: str) -> KernelCache:
        """Where the kernels of a plan on the GPU that is here are kept."""
        here = hashlib.blake2b(json.dumps([key, current_gpu()]).encode(), digest_size=16).hexdigest()
        return KernelCache(self, here)

    def _of(self, key: str, kind: str) -> list[Path]:
        return [path for path in self._files() if path.name.startswith(f"{key}-") and path.suffix == f".{kind}"]

    def _files(self) -> list[Path]:
        """Files of the folder that are the cache's."""
        with contextlib.suppress(OSError):
            return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        return []

    def _bound(self, newest: Path) -> None:
        """Remove those that were not used for longest, until the others are small enough; never the newest."""
        found = []
        for path in self._files():
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime_ns, path.name, path, path.stat().st_size))
        total = sum(size for *_, size in found)
        for _, _, path, size in sorted(found):
            if total > self.limit and path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _touch(path: Path) -> None:
    """Make a file the one that was used last; in a folder that may only be read nothing grows old."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _read(path: Path) -> bytes | None:
    """A file's bytes; None where another process removed it."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _file_name(key: str, content: bytes | memoryview, kind: str) -> str:
    return f"{key}-{hashlib.blake2b(content, digest_size=16).hexdigest()}.{kind}"


@dataclass(frozen=True)
class KernelCache:
    """One entry of a cache that is written again and again."""

    cache: PlanCache
    key: str

    def read(self) -> bytes | None:
        """What was written last."""
        return self.cache.read(self.key, KERNELS)

    def write(self, content: bytes | memoryview) -> None:
        """Write it in the place of what was there."""
        self.cache.write(self.key, content, KERNELS)
