"""Reading untrusted GGUF files.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. All numbers are little-endian; shapes are stored with
the fastest axis first.
"""

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorac.formats._errors import unsupported_error
from lorac.formats.reading import AdapterFile
from lorac.limits import check_time, claim_memory, pause_clock
from lorac.storage.tensor_file import TensorPlace, read_tensors

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Number of a type of values -> its form for ``struct``."""
_STRING, _ARRAY = 8, 9
_DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
"""Number of a type of tensors -> its dtype; blocks are read as bytes."""
_Q8_0, _Q8_0_VALUES, _Q8_0_BYTES = 8, 32, 34
"""A type of blocks: a scale in float16, and 32 values of one byte."""
_MOST_AXES, _MOST_NUMBERS, _LONGEST_TEXT = 4, 1024, 1 << 20


def read_gguf(file: AdapterFile) -> tuple[dict[str, object], dict[str, Tensor]]:
    """Return the fields of a file, with None for long arrays and arrays of texts, and copies of its tensors.

    Raises:
        FormatError: the file is damaged, or has a version or a tensor type that lorac does not read.
    """
    with file.open() as opened:
        try:
            return _Reader(file.path, opened, os.fstat(opened.fileno()).st_size).read()
        except (ValueError, EOFError) as error:
            raise file.damaged(str(error)) from error


@dataclass(frozen=True)
class _Reader:
    path: Path
    file: BufferedReader
    length: int

    def read(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        if self._take(4) != MAGIC:
            raise ValueError(f"it does not begin with {MAGIC.decode()}")
        version = self._number("<I")
        if version not in _VERSIONS:
            raise unsupported_error(
                f"'{self.path}' is version {version} of GGUF, and lorac reads {_VERSIONS[0]} and {_VERSIONS[1]}, "
                "little-endian",
                next_step="convert it again, with convert_lora_to_gguf.py of llama.cpp",
            )
        count, fields = self._number("<Q"), self._fields(self._number("<Q"))
        alignment = fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r}")
        places = {}
        for index in range(count):
            check_time(index)
            name, place = self._place()
            if name in places:
                raise ValueError(f"'{name}' is given twice")
            places[name] = place
        begin = -(-self.file.tell() // alignment) * alignment
        self._check_places(places, begin, alignment)
        with pause_clock():
            placed = {name: place._replace(begin=begin + place.begin) for name, place in places.items()}
            stored = read_tensors(self.file, placed)
            return fields, {name: _unpack(tensor) for name, tensor in stored.items()}

    def _fields(self, count: int) -> dict[str, object]:
        fields: dict[str, object] = {}
        for index in range(count):
            check_time(index)
            key = self._text()
            if key in fields:
                raise ValueError(f"the field '{key}' is given twice")
            fields[key] = self._value(self._number("<I"))
        return fields

    def _value(self, kind: int) -> object:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind != _ARRAY:
            raise ValueError(f"it has a value of the unknown type {kind}")
        inner, count = self._number("<I"), self._number("<Q")
        if inner in _SCALARS and count <= _MOST_NUMBERS:
            return [self._number(_SCALARS[inner]) for _ in range(count)]
        if inner in _SCALARS:
            self._skip(count * struct.calcsize(_SCALARS[inner]))
            return None
        if inner != _STRING:
            raise ValueError(f"it has an array of values of type {inner}")
        for index in range(count):
            check_time(index)
            self._skip(self._number("<Q"))
        return None

    def _place(self) -> tuple[str, TensorPlace]:
        """Read a tensor's name, and its place relative to the first tensor; quantised blocks are rows of bytes."""
        name, axes = self._text(), self._number("<I")
        if axes > _MOST_AXES:
            raise ValueError(f"'{name}' has {axes} axes, more than {_MOST_AXES}")
        shape = tuple(self._number("<Q") for _ in range(axes))[::-1]
        kind, begin = self._number("<I"), self._number("<Q")
        if kind not in _DTYPES and kind != _Q8_0:
            raise unsupported_error(
                f"'{name}' in '{self.path}' is of the type {kind} of GGUF, a quantised one that lorac does not read",
                next_step="convert it again with --outtype f32, f16, bf16 or q8_0",
            )
        if kind != _Q8_0:
            return name, TensorPlace(_DTYPES[kind], shape, begin)
        if not shape or shape[-1] % _Q8_0_VALUES:
            raise ValueError(f"'{name}' is {shape}, which blocks of {_Q8_0_VALUES} values do not fill")
        return name, TensorPlace(torch.uint8, (*shape[:-1], shape[-1] // _Q8_0_VALUES, _Q8_0_BYTES), begin)

    def _check_places(self, places: Mapping[str, TensorPlace], begin: int, alignment: int) -> None:
        """Refuse tensors that overlap, leave a gap beyond the alignment, or end before the file does."""
        reached = 0
        for name, place in sorted(places.items(), key=lambda item: (item[1].begin, item[1].size)):
            if place.begin != reached:
                raise ValueError(f"'{name}' begins at byte {place.begin} of the tensors, not {reached}")
            end = place.begin + place.size
            if begin + end > self.length:
                raise ValueError(f"'{name}' ends at byte {begin + end} of {self.length}")
            reached = -(-end // alignment) * alignment
        if places and self.length - begin - reached > 0:
            raise ValueError(f"{self.length - begin - reached} bytes at its end belong to no tensor")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self) -> str:
        length = self._number("<Q")
        if length > _LONGEST_TEXT:
            raise ValueError(f"a text has {length} bytes, more than {_LONGEST_TEXT}")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError as error:  # a ValueError too, whose text does not say where it occurred
            raise ValueError("a text is not UTF-8") from error

    def _take(self, count: int) -> bytes:
        data = self.file.read(count)
        if len(data) < count:
            raise ValueError(f"it ends at byte {self.length}, within its header")
        return data

    def _skip(self, count: int) -> None:
        if self.file.tell() + count > self.length:
            raise ValueError(f"it ends at byte {self.length}, within its header")
        self.file.seek(count, 1)


def _unpack(stored: Tensor) -> Tensor:
    """Dequantise blocks, which lie along the second-to-last axis; return any other tensor unchanged."""
    if stored.dtype is not torch.uint8:
        return stored
    claim_memory(4 * stored.numel() // _Q8_0_BYTES * _Q8_0_VALUES, "its blocks are unpacked")
    scales, values = stored[..., :2].contiguous().view(torch.float16), stored[..., 2:].view(torch.int8)
    return (scales.float() * values).flatten(-2)
