"""The library of the package lorac-native, which is optional: an op for ONNX Runtime, and writes into weights."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lorac.errors import warn

OP_VERSION = 3
"""The version of the op for ONNX Runtime."""
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class NativeLibrary:
    """The library of lorac-native.

    Attributes:
        path: the path of its file.
        kernels: the instruction set that it uses on this processor.

    Raises:
        OSError: the file does not load, or has another version of the op.
        AttributeError: the library lacks a function.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        if (version := library.LoracNativeOpVersion()) != OP_VERSION:
            raise OSError(f"its op has version {version}, and this lorac uses version {OP_VERSION}")
        describe = library.LoracNativeKernels
        describe.restype = ctypes.c_char_p
        self.path, self.kernels = path, describe().decode()
        self._scatter = _declare(library.LoracNativeWriteSparse, [_POINTER] * 4 + [_NUMBER] * 3)
        self._add_product = _declare(
            library.LoracNativeWriteProduct, [_POINTER, *[_POINTER, ctypes.c_bool] * 2, _POINTER, *[_NUMBER] * 4]
        )

    def scatter(self, writes: Sequence[tuple[Tensor, Tensor, Tensor]], item_bytes: int) -> None:
        """Scatter values into contiguous tensors of the same dtype; nothing is checked.

        Args:
            writes: triples of a tensor, distinct and ascending positions in it (int64), and the values for them. Writes
                into the same tensor are adjacent, and a later write overwrites an earlier one.
            item_bytes: bytes of a value.
        """
        count = len(writes)
        pointers = [(_POINTER * count)(*(one.data_ptr() for one in tensors)) for tensors in zip(*writes, strict=True)]
        counts = (_NUMBER * count)(*(positions.numel() for _, positions, _ in writes))
        self._scatter(*pointers, counts, count, item_bytes, torch.get_num_threads())

    def add_product(self, weight: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write W + left·right to ``out``: float32 matrices (n, m), (n, R), (R, m); nothing is checked.

        All are contiguous; a factor may also be the transpose of a contiguous matrix. The order of sums does not
        depend on the number of threads.
        """
        factors = [part for factor in (left, right) for part in (factor.data_ptr(), not factor.is_contiguous())]
        shape = (len(left), len(right), right.shape[1])
        self._add_product(weight.data_ptr(), *factors, out.data_ptr(), *shape, torch.get_num_threads())


def _declare(function: ctypes._NamedFuncPointer, types: Sequence[type]) -> ctypes._NamedFuncPointer:
    function.argtypes, function.restype = types, None
    return function


@functools.cache
def find_native_library() -> NativeLibrary | None:
    """Return the library, or None where lorac-native is not installed."""
    try:
        path: str = importlib.import_module("lorac_native").LIBRARY
    except ModuleNotFoundError:
        return None
    try:
        return NativeLibrary(path)
    except (OSError, AttributeError) as error:
        warn(f"lorac-native is installed, but its library does not load: {error}", next_step="install it again")
        return None
