"""Files that are opened once and stay open, so that later reads get the bytes that were checked.

A path may lead to another file the next time it is opened, when a folder has been replaced or removed. An open file is
hashed and read through one handle. It is not copied into memory, and stays on disk until the handle is closed. A
program that writes into the file in place changes it for every reader; lorac never does.
"""

import contextlib
import errno
import functools
import hashlib
import mmap
import os
import shutil
import stat
import weakref
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lorac.errors import ArtifactError, replace_in_errors

_PIECE, _CHUNK = 1 << 25, 1 << 20
"""Bytes that one thread hashes, and bytes that are read at a time."""
_NO_LINK: int = getattr(os, "O_NOFOLLOW", 0)  # which Windows lacks
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NOCTTY", "O_NONBLOCK"))


def open_handle(where: str | os.PathLike[str], *, follows_links: bool = False, within: int | None = None) -> int:
    """Open an untrusted file or folder, without waiting for a pipe, and return its handle.

    Windows cannot refuse links while it opens a path: a link that is made between the check and the call is followed.

    Args:
        where: the path.
        follows_links: whether the path may be a link.
        within: the handle of the folder to which the path is relative.
    """
    if not (follows_links or _NO_LINK) and os.path.islink(where):
        raise OSError(errno.ELOOP, "it is a link", os.fspath(where))
    return os.open(where, _FLAGS | (0 if follows_links else _NO_LINK), dir_fd=within)


class OpenFile:
    """A file, open for as long as this object lives.

    Args:
        where: the path at which it is opened; later only used in messages.
        follows_links: whether the path may be a link, as in the folders of the Hugging Face hub.

    Raises:
        OSError: the file is missing, is a link, or is not a regular file.
    """

    def __init__(self, where: Path, *, follows_links: bool = False) -> None:
        self.where = where
        self._handle = open_handle(where, follows_links=follows_links)
        self._mapping: weakref.ref[mmap.mmap] | None = None
        self._digest: str | None = None
        weakref.finalize(self, os.close, self._handle)
        if not stat.S_ISREG(os.fstat(self._handle).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(where))

    @property
    def size(self) -> int:
        """Size in bytes."""
        return os.fstat(self._handle).st_size

    @property
    def is_linked(self) -> bool:
        """Whether the file still has a name."""
        return os.fstat(self._handle).st_nlink > 0

    @property
    def path(self) -> Path:
        """Path of this file, for libraries that take no open file.

        On Linux it leads through the process' table of open files, and stays valid when the name changes. Elsewhere it
        is the file's own path, as long as that leads to the file.

        Raises:
            ArtifactError: on other systems, the file was removed or replaced.
        """
        if _has_handle_paths():
            return Path(f"/proc/self/fd/{self._handle}")
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._handle), os.stat(self.where)):
                return self.where
        raise ArtifactError(
            f"'{self.where}' was removed or replaced since it was opened",
            next_step="load the artifact again, or compile again from the model",
        )

    @contextlib.contextmanager
    def named(self) -> Iterator[Path]:
        """Yield ``path``; errors of the block name the path at which the file was opened instead."""
        path = self.path
        with replace_in_errors(str(path), str(self.where)):
            yield path

    def read(self) -> bytes:
        """Read all bytes."""
        return self.path.read_bytes()

    def mapped(self) -> mmap.mmap:
        """Map all bytes into memory, once for all users; the mapping ends with its last user.

        Writes to the mapping stay in this process. An empty file cannot be mapped.
        """
        mapping = None if self._mapping is None else self._mapping()
        if mapping is None:
            mapping = mmap.mmap(self._handle, 0, access=mmap.ACCESS_COPY)
            self._mapping = weakref.ref(mapping)
        return mapping

    def mapped_part(self, offset: int, size: int) -> memoryview:
        """Map some of the bytes into memory. Writes to the mapping do not reach the file."""
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._handle, offset - begin + size, access=mmap.ACCESS_COPY, offset=begin)
        return memoryview(mapped)[offset - begin :]

    def digest(self) -> str:
        """Return a hash of the bytes, 16 bytes as text: blake2b over the blake2b hashes of its pieces of 32 MiB.

        As many threads as there are cores hash pieces in parallel; the result is cached.
        """
        if self._digest is None:
            starts = range(0, self.size, _PIECE)
            threads = min(len(starts), os.cpu_count() or 1)
            if threads < 2:
                pieces = list(map(self._piece, starts))
            else:
                with ThreadPoolExecutor(threads) as pool:
                    pieces = list(pool.map(self._piece, starts))
            self._digest = hashlib.blake2b(b"".join(pieces), digest_size=16).hexdigest()
        return self._digest

    def _piece(self, start: int) -> bytes:
        digest = hashlib.blake2b()
        with self.path.open("rb", buffering=0) as file:
            file.seek(start)
            left = _PIECE
            while left and (chunk := file.read(min(_CHUNK, left))):
                digest.update(chunk)
                left -= len(chunk)
        return digest.digest()

    def copy_to(self, place: Path) -> None:
        """Copy the bytes to another path, whose folder is created."""
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, place)


def open_files(folder: Path, names: Iterable[str]) -> dict[str, OpenFile]:
    """Open files of a folder by name, relative to the folder and with slashes."""
    return {name: OpenFile(folder / name) for name in names}


@functools.cache
def _has_handle_paths() -> bool:
    """Return whether the system has paths that lead to open files, as Linux with /proc."""
    with contextlib.suppress(OSError), open(os.devnull, "rb") as file:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(f"/proc/self/fd/{file.fileno()}"))
    return False
