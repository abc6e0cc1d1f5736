"""Slot images: the slots of evicted adapters on disk, in one unnamed file of this process.

Reading an adapter's own file, checking its values and putting them in the order of its slots takes several times as
long as reading its bytes, and reducing its formula still longer. So its slots are written once, when the adapter is
evicted, and one read restores them. The file has no name: it is made
in the folder of the adapters, and the system frees its space when the process ends or is killed.
"""

import collections
import contextlib
import itertools
import os
import tempfile
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lorac.adapters.pool import PoolEntry
from lorac.adapters.stored import SlotLayout, StoredAdapter
from lorac.ir.slots.composition import ComposedWeights
from lorac.storage.tensor_file import raw_bytes

_AT_ONCE = 1024
"""The most buffers of a ``pwritev`` call: IOV_MAX of Linux and macOS."""


@dataclass(frozen=True, eq=False, slots=True)
class SlotImage:
    """The image of an adapter's slots.

    Attributes:
        name: the adapter's name.
        serial: the serial number of the adapter's pool entry.
        layout: the order of the slots.
        offset: the image's first byte in the file.
    """

    name: str
    serial: int
    layout: SlotLayout
    offset: int


class SlotImages:
    """The images of adapters by name. Threads may share them; a forked process cannot read them."""

    def __init__(self) -> None:
        self._lock, self._process = threading.Lock(), os.getpid()
        self._file: int | None = None
        self._images: dict[str, SlotImage] = {}
        self._layouts: weakref.WeakValueDictionary[object, SlotLayout] = weakref.WeakValueDictionary()
        self._free: dict[int, list[int]] = {}
        self._end = 0

    def find(self, name: str, entry: PoolEntry) -> SlotImage | None:
        """Return the image of an adapter, or None."""
        image = self._images.get(name) if self._process == os.getpid() else None
        return image if image is not None and image.serial == entry.serial else None

    def write(self, name: str, entry: PoolEntry, snapshot: ComposedWeights, tensors: Mapping[str, Tensor]) -> None:
        """Write the image of an adapter, unless it has one or the disk is full.

        Args:
            name: the adapter's name.
            entry: the adapter's pool entry; the file is made in the folder of the first adapter.
            snapshot: the adapter, composed at every site.
            tensors: the contents of the adapter's slots.
        """
        assert isinstance(entry.source, StoredAdapter)
        with self._lock, contextlib.suppress(OSError):
            if not hasattr(os, "preadv") or self._process != os.getpid() or self.find(name, entry) is not None:
                return
            self._forget(name)
            file, layout = self._open(entry.source.folder), SlotLayout.of(snapshot, tensors)
            layout = self._layouts.setdefault(layout.key, layout)
            places = self._free.setdefault(layout.nbytes, [])
            if not places:
                places.append(self._end)
                self._end += layout.nbytes
            image = SlotImage(name, entry.serial, layout, places[-1])
            parts = collections.deque[memoryview | bytes]()
            for stack, names in layout.stacks:
                for slot in names:
                    values = raw_bytes(tensors[slot])
                    parts += (values, bytes(stack.nbytes // stack.count - len(values)))  # zeros align the next slot
            _write(file, parts, image.offset)  # where the disk is full, the place stays free
            self._images[name] = image
            places.pop()

    def _open(self, folder: Path) -> int:
        """Return the open file; the first call creates it, without a name, in a folder."""
        if self._file is None:
            with tempfile.TemporaryFile(dir=folder) as file:
                self._file = os.dup(file.fileno())
            weakref.finalize(self, os.close, self._file)
        return self._file

    def read(self, image: SlotImage, memory: Tensor) -> bool:
        """Read an image into memory of its size; return False where the image was dropped."""
        with self._lock:
            if self._file is None or self._images.get(image.name) is not image:
                return False
            return _read(self._file, raw_bytes(memory), image.offset)

    def forget(self, name: str) -> None:
        """Free the space of an adapter's image."""
        with self._lock:
            self._forget(name)

    def clear(self) -> None:
        """Free the space of all images."""
        with self._lock:
            for name in tuple(self._images):
                self._forget(name)

    def _forget(self, name: str) -> None:
        image = self._images.pop(name, None)
        if image is not None:
            self._free.setdefault(image.layout.nbytes, []).append(image.offset)


def _write(file: int, parts: collections.deque[memoryview | bytes], offset: int) -> None:
    """Write buffers one after another, as many per call as allowed: the file system then uses larger pages."""
    while parts:
        left = os.pwritev(file, [*itertools.islice(parts, _AT_ONCE)], offset)
        offset += left
        while parts and left >= len(parts[0]):
            left -= len(parts.popleft())
        if left:
            parts[0] = parts[0][left:]


def _read(file: int, memory: memoryview, offset: int) -> bool:
    """Fill memory from a file; return False where the file is too short."""
    while memory:
        count = os.preadv(file, [memory], offset)
        if not count:
            return False
        memory, offset = memory[count:], offset + count
    return True
