"""Files that are opened once and held: what was checked is what is read, whatever becomes of their names meanwhile.

A path is a question that may be answered otherwise the next time: a folder is replaced or removed, and half of what
was read comes from elsewhere. A held file is opened once, its hash is taken of what was opened, and whoever reads it
later reads that. Nothing is copied into memory for it; on disk a file that is held stays until it is let go.

Held is the file, not its bytes: a program that writes into it in place is seen by all that read it. lorac never does.
"""

from __future__ import annotations

import contextlib
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

from lorac.errors import ArtifactError, LoracError

_PIECE, _CHUNK = 1 << 25, 1 << 20
"""Bytes that are hashed by one thread, and that are read at a time."""
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_BINARY", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"))
"""A link at the path is not followed, and a pipe there is not waited for."""


class OpenFile:
    """A file, open for as long as this object lives.

    Args:
        where: its path when it was opened; later only named in messages.

    Raises:
        OSError: it is not there, is a link, or is no file.
    """

    def __init__(self, where: Path) -> None:
        self.where = where
        self._handle = os.open(where, _FLAGS)
        self._mapping: weakref.ref[mmap.mmap] | None = None
        weakref.finalize(self, os.close, self._handle)
        if not stat.S_ISREG(os.fstat(self._handle).st_mode):
            raise OSError(f"'{where}' is no file")

    @property
    def size(self) -> int:
        """Its bytes."""
        return os.fstat(self._handle).st_size

    @property
    def is_linked(self) -> bool:
        """Whether it has a name yet, whichever that is."""
        return os.fstat(self._handle).st_nlink > 0

    @property
    def path(self) -> Path:
        """A path at which this very file is opened, for libraries that take no open file.

        On Linux it leads through the process' own table of open files and stays right whatever becomes of the name.
        Elsewhere it is the file's own, for as long as it leads to the file.

        Raises:
            ArtifactError: elsewhere: it was removed, or another file took its place.
        """
        if _tells_open_files():
            return Path(f"/proc/self/fd/{self._handle}")
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(self._handle), os.lstat(self.where)):
                return self.where
        raise ArtifactError(
            f"'{self.where}' was removed or replaced since it was opened",
            next_step="load the artefact again, or compile again from the model",
        )

    @contextlib.contextmanager
    def named(self) -> Iterator[Path]:
        """``path`` for the block; errors that speak of it speak of the file by the name it was opened by."""
        path = self.path
        try:
            yield path
        except LoracError as error:
            told = [text and text.replace(str(path), str(self.where)) for text in _texts(error)]
            LoracError.__init__(error, str(told[0]), nearest=told[1], next_step=told[2])
            raise

    def read(self) -> bytes:
        """All of it."""
        return self.path.read_bytes()

    def mapped(self) -> mmap.mmap:
        """Its bytes where they lie, once for all that use them, and let go with the last of these.

        What is written there is this process' own. An empty file has none to map.
        """
        known = None if self._mapping is None else self._mapping()
        if known is None:
            known = mmap.mmap(self._handle, 0, access=mmap.ACCESS_COPY)
            self._mapping = weakref.ref(known)
        return known

    def mapped_part(self, offset: int, size: int) -> memoryview:
        """Some of its bytes where they lie. What is written there is the caller's own, and reaches no file."""
        begin = offset - offset % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._handle, offset - begin + size, access=mmap.ACCESS_COPY, offset=begin)
        return memoryview(mapped)[offset - begin :]

    def digest(self) -> str:
        """The hash of its bytes, 16 bytes as text: blake2b over the blake2b hashes (64 bytes) of its pieces of 32 MiB.

        Pieces are hashed at the same time, by as many threads as there are cores.
        """
        starts = range(0, self.size, _PIECE)
        threads = min(len(starts), os.cpu_count() or 1)
        if threads < 2:
            pieces = list(map(self._piece, starts))
        else:
            with ThreadPoolExecutor(threads) as pool:
                pieces = list(pool.map(self._piece, starts))
        return hashlib.blake2b(b"".join(pieces), digest_size=16).hexdigest()

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
        """Write its bytes to another path, whose folder is made."""
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.path, place)


def open_files(folder: Path, names: Iterable[str]) -> dict[str, OpenFile]:
    """Files of a folder by name, from the folder on, with slashes."""
    return {name: OpenFile(folder / name) for name in names}


def _texts(error: LoracError) -> tuple[str | None, ...]:
    return error.what, error.nearest, error.next_step


@functools.cache
def _tells_open_files() -> bool:
    """Whether open files have paths that lead to them, and not to whatever has their name now: Linux with /proc."""
    with contextlib.suppress(OSError), open(os.devnull, "rb") as file:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(f"/proc/self/fd/{file.fileno()}"))
    return False
