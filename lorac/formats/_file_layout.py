"""The common layout of adapter files that differ only in values, and reading such a file by it.

Once a format has read one of them, only the values of the next are looked at.
"""

import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorac.adapters.fit import check_finite, sum_values
from lorac.formats._files import MAX_HEADER, SEAL, Outline, check_seal
from lorac.storage.tensor_file import TensorPlace, raw_bytes

_PART = 1 << 20
"""Bytes that are read at a time: so many stay in the processor's cache until they are copied to where they belong."""
_OWN_SEAL = re.compile(rb'"lorac_seal":"([0-9a-f]*)"')
"""The digest of a file's values."""
_OWN_NAME = re.compile(rb'"lorac":"{\\"version\\":\d+,\\"name\\":\\"([^"\\]*)\\"')
"""The name that an adapter had when lorac wrote it, which its registered name replaces."""


class FileHeader(NamedTuple):
    """A header of a safetensors file.

    Attributes:
        common: the header without what is each file's own: its seal and the adapter's name.
    """

    common: bytes
    seal: str | None
    name: str | None


def read_header(file: BufferedReader | FileIO) -> FileHeader:
    """Return the header of a safetensors file; of any other file, some bytes."""
    length, size = int.from_bytes(file.read(8), "little"), os.fstat(file.fileno()).st_size
    text = file.read(min(length, size, MAX_HEADER))
    own = [pattern.search(text) for pattern in (_OWN_SEAL, _OWN_NAME)]
    common = text
    for found in sorted((one for one in own if one is not None), key=lambda found: -found.start()):
        common = common[: found.start(1)] + common[found.end(1) :]
    seal, name = (None if found is None else found[1].decode() for found in own)
    return FileHeader(common, seal, name)


class FilePart(NamedTuple):
    """Tensors of a file that are read together.

    Attributes:
        names: the tensors, one behind the other.
        begin: their first byte.
        size: their bytes.
    """

    names: tuple[str, ...]
    begin: int
    size: int


@dataclass(frozen=True, eq=False)
class FileLayout:
    """The layout of tensor files of one dtype that differ only in values.

    Attributes:
        header: of one of them.
        places: where the tensors lie, by name, counted from the first of their bytes.
        sealed: the text that the seal of that one covers together with the tensors; None if it has no seal.
    """

    header: FileHeader
    places: Mapping[str, TensorPlace]
    sealed: str | None

    @classmethod
    def of(cls, outline: Outline) -> "FileLayout | None":
        """Return the layout of an adapter's file; None if it has several, or dtypes, or seals of its parts."""
        dtypes = {tensor.dtype for tensor in outline.tensors.values()}
        if len(outline.files) != 1 or len(dtypes) != 1 or len(outline.sealed) > 1:
            return None
        ((path, places),) = outline.files.items()
        if any(names != places.keys() for _, names in outline.sealed):
            return None
        with path.open("rb") as file:
            header, first = read_header(file), file.tell()
        places = {name: place._replace(begin=place.begin - first) for name, place in places.items()}
        return cls(header, places, outline.sealed[0][0] if outline.sealed and header.seal is not None else None)

    @functools.cached_property
    def nbytes(self) -> int:
        """The size of the tensors, which leave no holes."""
        return sum(place.size for place in self.places.values())

    @functools.cached_property
    def parts(self) -> Sequence[FilePart]:
        """The parts that are read at a time, in the order of the file: one, if a seal covers all tensors."""
        parts = list[FilePart]()
        for name, place in sorted(self.places.items(), key=lambda item: item[1].begin):
            last = parts[-1] if parts else None
            if last is not None and (self.sealed is not None or last.size + place.size <= _PART):
                parts[-1] = FilePart((*last.names, name), last.begin, last.size + place.size)
            else:
                parts.append(FilePart((name,), place.begin, place.size))
        return parts

    def read(self, path: Path) -> Iterator[Tensor]:
        """Yield the bytes of each part of a file, checked as ``read_safetensors`` does; none if its layout is another.

        Each takes the memory of the one before.

        Raises:
            OSError: it cannot be opened.
            FormatError, AdapterError: as ``read_safetensors`` and ``check_seal``.
        """
        with path.open("rb", buffering=0) as file:
            header, size = read_header(file), os.fstat(file.fileno()).st_size - file.tell()
            if header.common == self.header.common and size == self.nbytes:
                yield from self._read_parts(path, file, header)

    def _read_parts(self, path: Path, file: FileIO, header: FileHeader) -> Iterator[Tensor]:
        memory = torch.empty(max(part.size for part in self.parts), dtype=torch.uint8)
        for part in self.parts:
            values = memory[: part.size]
            if file.readinto(raw_bytes(values)) != part.size:
                return
            self._check(path, part, values, header)
            yield values

    def _check(self, path: Path, part: FilePart, values: Tensor, header: FileHeader) -> None:
        """Check the values of a part, and the seal of its file."""
        dtype = self.places[part.names[0]].dtype
        if not sum_values(values.view(dtype)).isfinite():
            check_finite(self._take_tensors(part, values), f"'{path}'")
        if header.seal is not None and self.sealed is not None:
            text = self.sealed.replace(f'"name":"{self.header.name}"', f'"name":"{header.name}"', 1)
            check_seal(path, text, self._take_tensors(part, values), {SEAL: header.seal})

    def _take_tensors(self, part: FilePart, values: Tensor) -> dict[str, Tensor]:
        places = {name: self.places[name] for name in part.names}
        return {name: place._replace(begin=place.begin - part.begin).take(values) for name, place in places.items()}
