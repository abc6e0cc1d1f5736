"""Arrays in requests and answers: as JSON, or as NumPy's npz."""

import io
import zipfile
from collections.abc import Mapping

import numpy
import torch
from torch import Tensor

from lorac.ir.calls.call import to_numpy
from lorac.ir.sites.site import cast_floating
from lorac.serving.refusals import RefusedField

_LARGE = 1 << 14
"""The most numbers that one call of NumPy converts to a list."""


def read_lists(inputs: Mapping[str, list[object]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return nested lists as tensors.

    Args:
        dtype: the dtype of floating-point tensors.

    Raises:
        RefusedField: a value is not an array of numbers.
    """
    tensors = {}
    for name, value in inputs.items():
        try:
            array = numpy.asarray(value)
        except ValueError as error:
            raise RefusedField(f"inputs.{name}", "has rows of several lengths") from error
        if array.dtype.kind not in "bif":
            raise RefusedField(f"inputs.{name}", "holds a value that is not a number, or one beyond 64 bits")
        tensors[name] = cast_floating(torch.from_numpy(array), dtype)
    return tensors


def read_npz(body: bytes, most: int) -> dict[str, Tensor]:
    """Return the arrays of an npz file.

    Args:
        most: the most bytes of all arrays together.

    Raises:
        RefusedField: the file is damaged, too large, or contains objects.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > most:
            raise RefusedField("inputs", f"have {size} bytes, and a request has at most {most}")
        with numpy.load(io.BytesIO(body), allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile, NotImplementedError) as error:
        raise RefusedField("inputs", "are not an npz file of numbers") from error


def write_npz(outputs: Mapping[str, Tensor]) -> bytes:
    """Return tensors as an npz file."""
    file = io.BytesIO()
    numpy.savez(file, **{name: to_numpy(tensor) for name, tensor in outputs.items()})  # type: ignore[arg-type]  # a name
    return file.getvalue()


def write_lists(tensor: Tensor) -> list[object]:
    """Return a tensor as nested lists; infinities and NaN, for which JSON has no number, are null."""
    array = to_numpy(tensor)
    if array.ndim > 1 and array.size > _LARGE:  # NumPy holds the interpreter lock during a call
        return [write_lists(part) for part in tensor]
    objects = array.astype(object)
    if array.dtype.kind == "f":
        objects[~numpy.isfinite(array)] = None
    found: list[object] = objects.tolist()
    return found
