"""Built plans in a folder, found by a key of their inputs and checked before they are used.

Each plan has its own file, whose name contains the key and the hash of the content. The file is written under another
name and then renamed. A damaged plan is not used; if the folder becomes too large, the least recently used plans are
removed. Other files in the folder are not touched.

A plan is code for the GPU. So the folder and its files are used only if they belong to the user and nobody else can
access them; otherwise plans are built as if there were no folder.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lorac.backends.tensorrt.library import TensorRTLibrary
from lorac.errors import warn
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.open_file import OpenFile

PLAN, KERNELS, TIMINGS = "plan", "kernels", "timings"
"""Endings of the folder's files."""
_NAME = re.compile(rf"[0-9a-f]{{32}}-[0-9a-f]{{32}}\.(?:{PLAN}|{KERNELS}|{TIMINGS})")
_PRIVATE = 0o700
"""The mode of the folder."""
DEFAULT_LIMIT = 8 << 30
"""The default of the bytes that all plans may take together."""


def plan_key(
    program: Iterable[OpenFile], capabilities: Sequence[str], library: TensorRTLibrary, **settings: object
) -> str:
    """Return the key of a plan; equal inputs give equal keys.

    Args:
        program: the emitted model and its weights.
        capabilities: compute capabilities; if empty, the key includes torch's current GPU.
        library: the library that builds the plan.
        settings: other settings of the library, such as profiles and flags, distinguished by ``repr``.

    Returns:
        32 hexadecimal digits.
    """
    facts = {
        "program": sorted((file.where.name, file.digest()) for file in program),
        "library": library.name_and_version,
        "capabilities": sorted(capabilities),
        "gpus": [] if capabilities and library.is_rtx else current_gpu(),
        "settings": {name: repr(_ordered(value)) for name, value in settings.items()},
    }
    return _hash_facts(facts)


def current_gpu() -> list[str]:
    """Return the current GPU's name and compute capability; empty on a machine without one."""
    if not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability()
    return [f"{torch.cuda.get_device_name()} {major}.{minor}"]


def _hash_facts(facts: object) -> str:
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _ordered(value: object) -> object:
    """Return a value whose ``repr`` does not depend on the order of mappings."""
    if isinstance(value, Mapping):
        return sorted((repr(key), repr(_ordered(part))) for key, part in value.items())
    if isinstance(value, list | tuple):
        return [_ordered(part) for part in value]
    return value


@dataclass(frozen=True)
class PlanCache:
    """A cache of plans in a folder.

    Attributes:
        folder: the folder, created on the first write.
        limit: the maximum total size of all plans in bytes.
    """

    folder: Path
    limit: int = DEFAULT_LIMIT

    def plan(self, key: str, build: Callable[[], bytes | memoryview]) -> bytes | memoryview:
        """Return the plan for a key from the folder; if it is missing, build and write it."""
        found = self.read(key)
        if found is not None:
            return found
        made = build()
        self.write(key, made)
        return made

    def read(self, key: str, kind: str = PLAN) -> bytes | None:
        """Return the content for a key, checked against its hash; None if it is missing or damaged."""
        for path in self._of(key, kind):
            content = _read(path)
            if content is not None and path.name == _file_name(key, content, kind):
                with contextlib.suppress(OSError):  # in a read-only folder
                    os.utime(path)
                return content
        return None

    def write(self, key: str, content: bytes | memoryview, kind: str = PLAN) -> bool:
        """Write the content for a key, replacing an earlier one; if that fails, warn and return False."""
        path = self.folder / _file_name(key, content, kind)
        try:
            self.folder.mkdir(mode=_PRIVATE, parents=True, exist_ok=True)
            if not self._is_private():
                raise OSError(errno.EPERM, "its mode is not 0700, or it is another user's")
            with replace_atomically(path) as staged:
                staged.write_bytes(content)
            for older in {*self._of(key, kind)} - {path}:
                older.unlink(missing_ok=True)
            self._bound(path)
        except OSError as error:
            warn(
                f"plan_cache='{self.folder}' is not used: {error.strerror or error}",
                next_step="give a folder that only you can open, or a new path, where lorac makes one",
            )
            return False
        return True

    def kernels(self, key: str) -> "CachedFile":
        """Return the cache entry of a plan's compiled kernels for torch's current GPU."""
        return CachedFile(self, _hash_facts([key, current_gpu()]), KERNELS)

    def timings(self, library: TensorRTLibrary) -> "CachedFile":
        """Return the cache entry of the kernel timings that a library measured on torch's current GPU."""
        return CachedFile(self, _hash_facts([library.name_and_version, current_gpu()]), TIMINGS)

    def _is_private(self) -> bool:
        """Return whether the folder belongs to the user, and nobody else can access it."""
        found = self.folder.stat()
        return sys.platform == "win32" or (found.st_uid == os.geteuid() and not found.st_mode & 0o777 & ~_PRIVATE)

    def _of(self, key: str, kind: str) -> list[Path]:
        return [path for path in self._files() if path.name.startswith(f"{key}-") and path.suffix == f".{kind}"]

    def _files(self) -> list[Path]:
        """Return the files of the folder that belong to the cache; empty if others can write there."""
        with contextlib.suppress(OSError):
            if self._is_private():
                return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))
        return []

    def _bound(self, newest: Path) -> None:
        """Remove the least recently used files until the rest is within the limit, but never the newest."""
        found = []
        for path in self._files():
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime_ns, path.name, path, path.stat().st_size))
        total = sum(size for *_, size in found)
        for _, _, path, size in sorted(found):
            if total > self.limit and path != newest:
                path.unlink(missing_ok=True)
                total -= size


def _read(path: Path) -> bytes | None:
    """Return a file's bytes; None if another process removed it, or if it belongs to another user."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if sys.platform == "win32" or os.fstat(file.fileno()).st_uid == os.geteuid():
            return file.read()
    return None


def _file_name(key: str, content: bytes | memoryview, kind: str) -> str:
    return f"{key}-{hashlib.blake2b(content, digest_size=16).hexdigest()}.{kind}"


@dataclass(frozen=True)
class CachedFile:
    """An entry of a plan cache that is rewritten repeatedly."""

    cache: PlanCache
    key: str
    kind: str

    def read(self) -> bytes | None:
        """Return the content that was written last."""
        return self.cache.read(self.key, self.kind)

    def write(self, content: bytes | memoryview) -> bool:
        """Write the content, replacing the earlier one (``PlanCache.write``)."""
        return self.cache.write(self.key, content, self.kind)
