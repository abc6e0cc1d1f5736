"""The common layout of adapter files that differ only in values, and reading such a file by it.

Once a format has read one of them, only the values of the next are looked at.
"""

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader, FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lorac.adapters.fit import check_finite, find_infinite_sums
from lorac.formats._files import MAX_HEADER, SEAL, Outline, check_seal
from lorac.storage.tensor_file import TensorPlace, raw_bytes

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


@dataclass(frozen=True, eq=False)
class FileLayout:
    """The layout of tensor files of one dtype that differ only in values.

    Attributes:
        header: of one of them.
        places: where the tensors lie, by name, counted from the first of their bytes.
        sealed: the text that the seal of that one covers together with the tensors; None if the format has no seals.
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
        return cls(header, places, outline.sealed[0][0] if outline.sealed else None)

    @functools.cached_property
    def nbytes(self) -> int:
        """The size of the tensors, which leave no holes."""
        return sum(place.size for place in self.places.values())

    def read(self, path: Path) -> Tensor | None:
        """Return the bytes of a file's tensors, checked as ``read_safetensors`` does; None of another layout.

        Raises:
            OSError: it cannot be opened.
            FormatError, AdapterError: as ``read_safetensors`` and ``check_seal``.
        """
        with path.open("rb", buffering=0) as file:
            header, size = read_header(file), os.fstat(file.fileno()).st_size - file.tell()
            if header.common != self.header.common or size != self.nbytes:
                return None
            block = torch.empty(size, dtype=torch.uint8)
            if file.readinto(raw_bytes(block)) != size:
                return None
        (dtype,) = {place.dtype for place in self.places.values()}
        if find_infinite_sums({"all": block.view(dtype)}):
            check_finite(self._take_tensors(block), f"'{path}'")
        if header.seal is not None and self.sealed is not None:
            text = self.sealed.replace(f'"name":"{self.header.name}"', f'"name":"{header.name}"', 1)
            check_seal(path, text, self._take_tensors(block), {SEAL: header.seal})
        return block

    def _take_tensors(self, block: Tensor) -> dict[str, Tensor]:
        return {name: place.take(block) for name, place in self.places.items()}
