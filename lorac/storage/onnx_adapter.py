"""Tensors by name in an ``.onnx_adapter``, ONNX Runtime's file format for adapters.

It is a flat buffer: https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/lora/adapter_format/adapter_schema.fbs.
ONNX Runtime does not compare the length of a parameter with its shape, so the file is read here instead.
"""

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor

from lorac.errors import FormatError, Unavailable, translate_import_errors
from lorac.limits import check_time, claim_memory, pause_clock
from lorac.storage.tensor_file import TensorPlace, read_tensors

MAGIC = b"TORT"
"""Bytes 4 to 8 of every file."""
_VERSION = 1
"""Version of the adapter and of the model; ONNX Runtime requires both numbers, and does not compare them."""
_MAX_BYTES = (1 << 31) - (1 << 20)
"""The most bytes of tensors in a file: less than 2 GiB, descriptions included."""
_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
"""ONNX's number of a data type -> dtype."""
_PARAMETERS = 3
"""Field of the root: the vector of parameters."""
_NAME, _DIMS, _TYPE, _DATA = range(4)
"""Fields of a parameter."""
_LONGEST_NAME, _MOST_AXES = 1000, 8


def write_onnx_adapter(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as an ``.onnx_adapter``; equal tensors give equal bytes.

    Raises:
        MissingExtra: ONNX Runtime, which writes such files, is not installed; reading them does not need it.
        Unavailable: the tensors are too large for such a file.
    """
    with translate_import_errors():
        import onnxruntime as ort

    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > _MAX_BYTES:
        raise Unavailable(
            f"'{path.name}' would have {size} bytes, and an .onnx_adapter holds less than 2 GiB",
            next_step="compile with mode='live', which binds factors instead of merged weights",
        )
    kept = {name: tensors[name].detach().contiguous() for name in sorted(tensors)}
    values = {}
    for name, tensor in kept.items():
        if tensor.dtype is torch.bfloat16:  # NumPy has no such type
            values[name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), 16)
        else:
            values[name] = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(_VERSION)
    adapter.set_model_version(_VERSION)
    adapter.set_parameters(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    adapter.export_adapter(str(path))


def read_onnx_adapter(file: BufferedReader, refuse: Callable[[str], FormatError]) -> dict[str, Tensor]:
    """Read the tensors of an ``.onnx_adapter`` into memory.

    Args:
        refuse: makes the error from its reason.

    Raises:
        FormatError: made by ``refuse``, if the file is damaged.
    """
    length = os.fstat(file.fileno()).st_size
    try:
        places = _FlatBuffer(file, length).parameters()
    except (struct.error, UnicodeDecodeError) as error:
        raise refuse(f"it is not an adapter of ONNX Runtime ({error})") from error
    except ValueError as error:
        raise refuse(str(error)) from error
    claim_memory(sum(place.size for place in places.values()) - length, "its tensors share bytes")
    with pause_clock():
        return read_tensors(file, places)


@dataclass(frozen=True)
class _FlatBuffer:
    """The part of a flat buffer's layout that adapters use; every offset is checked against the size of the file."""

    file: BufferedReader
    length: int

    def parameters(self) -> dict[str, TensorPlace]:
        """Return the places of all tensors by name.

        Raises:
            ValueError, struct.error, UnicodeDecodeError: the file is damaged.
        """
        if self._read(4, 4) != MAGIC:
            raise ValueError("it is no adapter of ONNX Runtime")
        vector = self._field(self._follow(0), _PARAMETERS)
        first, count = (0, 0) if vector is None else self._vector(vector, 4)
        found: dict[str, TensorPlace] = {}
        for index in range(count):
            check_time(index)
            name, place = self._parameter(self._follow(first + 4 * index))
            if name in found:
                raise ValueError(f"'{name}' is given twice")
            found[name] = place
        return found

    def _parameter(self, table: int) -> tuple[str, TensorPlace]:
        name, dims, kind, data = (self._field(table, field) for field in (_NAME, _DIMS, _TYPE, _DATA))
        if name is None or data is None:
            raise ValueError("a parameter lacks its name or its values")
        begin, length = self._vector(name, 1)
        if length > _LONGEST_NAME:
            raise ValueError(f"the name of a parameter has {length} characters, more than {_LONGEST_NAME}")
        text = self._read(begin, length).decode()
        first, axes = (0, 0) if dims is None else self._vector(dims, 8)
        if axes > _MOST_AXES:
            raise ValueError(f"'{text}' has {axes} axes, more than {_MOST_AXES}")
        shape = struct.unpack(f"<{axes}q", self._read(first, 8 * axes))
        number = 0 if kind is None else struct.unpack("<i", self._read(kind, 4))[0]
        if number not in _DTYPES:
            raise ValueError(f"'{text}' has the data type {number}, which is not one of {', '.join(map(str, _DTYPES))}")
        begin, size = self._vector(data, 1)
        place = TensorPlace(_DTYPES[number], shape, begin)
        if min(shape, default=0) < 0 or place.size != size:
            raise ValueError(f"'{text}' is {place.dtype} {shape}, but has {size} bytes")
        return text, place

    def _read(self, at: int, count: int) -> bytes:
        if at < 0 or at + count > self.length:
            raise ValueError(f"an offset leads to byte {at + count} of {self.length}")
        self.file.seek(at)
        return self.file.read(count)

    def _follow(self, at: int) -> int:
        """Read the offset at a byte, and return the byte to which it leads."""
        return at + int.from_bytes(self._read(at, 4), "little")

    def _vector(self, at: int, itemsize: int) -> tuple[int, int]:
        """Follow the offset at a byte to a vector; return the byte of its first item, and the number of items."""
        begin = self._follow(at)
        count = int.from_bytes(self._read(begin, 4), "little")
        if begin + 4 + count * itemsize > self.length:
            raise ValueError(f"a vector of {count} items ends behind byte {self.length}, the last")
        return begin + 4, count

    def _field(self, table: int, number: int) -> int | None:
        """Return the byte of a field of a table; None if the field has its default."""
        layout = table - struct.unpack("<i", self._read(table, 4))[0]
        size = int.from_bytes(self._read(layout, 2), "little")
        if 4 + 2 * number + 2 > size:
            return None
        offset = int.from_bytes(self._read(layout + 4 + 2 * number, 2), "little")
        return table + offset if offset else None
