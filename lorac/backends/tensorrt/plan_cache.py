"""Built plans in a folder, found by their inputs and checked before they are used.

Each plan has a file of its own, whose name holds the key and the hash of the contents. It is written to another file
and moved into place in one step. A damaged plan is not used; where the folder becomes too large, the least recently
used plans are removed. Nothing else in the folder is touched.
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
"""Endings of the folder's files."""
_NAME = re.compile(rf"[0-9a-f]{{32}}-[0-9a-f]{{32}}\.(?:{PLAN}|{KERNELS})")
DEFAULT_LIMIT = 8 << 30
"""The default of the bytes that all plans may take together."""


def plan_key(program: Iterable[OpenFile], capabilities: Sequence[str], **settings: object) -> str:
    """Return the key of a plan, equal for equal plans.

    Args:
        program: the emitted model and its weights.
        capabilities: compute capabilities; empty: for this machine's GPU, which is then part of the key.
        settings: other settings of the library, such as profiles and flags, distinguished by ``repr``.

    Returns:
        32 hexadecimal digits.
    """
    facts = {
        "program": sorted((file.where.name, file.digest()) for file in program),
        "library": library.name_and_version(),
        "capabilities": sorted(capabilities),
        "gpus": [] if capabilities and library.is_rtx() else current_gpu(),
        "settings": {name: repr(_ordered(value)) for name, value in settings.items()},
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def current_gpu() -> list[str]:
    """Return the current GPU's name and compute capability; empty on a machine without one."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    return [f"{torch.cuda.get_device_name()} {major}.{minor}"]


def _ordered(value: object) -> object:
    """Return a value whose ``repr`` does not depend on the order of mappings."""
    if isinstance(value, Mapping):
        return sorted((repr(key), repr(_ordered(part))) for key, part in value.items())
    if isinstance(value, list | tuple):
        return [_ordered(part) for part in value]
    return value


@dataclass(frozen=True)
class PlanCache:
    """Plans in a folder.

    Attributes:
        folder: the folder, made on the first write.
        limit: the bytes that all plans may take together.
    """

    folder: Path
    limit: int = DEFAULT_LIMIT

    def plan(self, key: str, build: Callable[[], bytes | memoryview]) -> bytes | memoryview:
        """Return the plan for a key from the folder, or build and write it.

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
        """Return the contents for a key, checked against their hash, or None."""
        for path in self._of(key, kind):
            content = _read(path)
            if content is not None and path.name == _file_name(key, content, kind):
                _touch(path)
                return content
        return None

    def write(self, key: str, content: bytes | memoryview, kind: str = PLAN) -> None:
        """Write the contents for a key, in the place of earlier ones.

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
        """Return the cache of a plan's kernels on this machine's GPU."""
        here = hashlib.blake2b(json.dumps([key, current_gpu()]).encode(), digest_size=16).hexdigest()
        return KernelCache(self, here)

    def _of(self, key: str, kind: str) -> list[Path]:
        return [path for path in self._files() if path.name.startswith(f"{key}-") and path.suffix == f".{kind}"]

    def _files(self) -> list[Path]:
        """Return the files of the folder that belong to the cache."""
        with contextlib.suppress(OSError):
            return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        return []

    def _bound(self, newest: Path) -> None:
        """Remove the least recently used files until the rest is small enough, but never the newest."""
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
    """Mark a file as used now, unless the folder is read-only."""
    with contextlib.suppress(OSError):
        os.utime(path)


def _read(path: Path) -> bytes | None:
    """Return a file's bytes; None if another process removed it."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def _file_name(key: str, content: bytes | memoryview, kind: str) -> str:
    return f"{key}-{hashlib.blake2b(content, digest_size=16).hexdigest()}.{kind}"


@dataclass(frozen=True)
class KernelCache:
    """The compiled kernels of one plan, which are written again and again."""

    cache: PlanCache
    key: str

    def read(self) -> bytes | None:
        """Return what was written last."""
        return self.cache.read(self.key, KERNELS)

    def write(self, content: bytes | memoryview) -> None:
        """Write the kernels in the place of earlier ones."""
        self.cache.write(self.key, content, KERNELS)
