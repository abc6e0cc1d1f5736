"""The library of the package lorac-native, which is optional: an op for ONNX Runtime, and writes into weights."""

from __future__ import annotations

import ctypes
import functools
import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from lorac.errors import warn

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class NativeLibrary:
    """The library of lorac-native.

    Attributes:
        path: its file.
        kernels: the instruction set that it uses on this processor.

    Raises:
        OSError: the file does not load.
        AttributeError: it lacks a function.
    """

    def __init__(self, path: str) -> None:
        library = ctypes.CDLL(path)
        describe = library.LoracNativeKernels
        describe.restype = ctypes.c_char_p
        self.path, self.kernels = path, describe().decode()
        self._scatter = _declare(library.LoracNativeScatter, [_POINTER] * 3 + [_NUMBER] * 3)
        self._add_product = _declare(library.LoracNativeAddProduct, [_POINTER] * 4 + [_NUMBER] * 4)

    def scatter(self, memory: Tensor, positions: Tensor, values: Tensor) -> None:
        """Write values at distinct positions (int64) of a contiguous tensor of their type; nothing is checked."""
        count, threads = positions.numel(), torch.get_num_threads()
        self._scatter(memory.data_ptr(), positions.data_ptr(), values.data_ptr(), count, values.element_size(), threads)

    def add_product(self, weight: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Write W + left·right to ``out``: contiguous float32 matrices (n, m), (n, R), (R, m); nothing is checked.

        Sums have the same order whatever the number of threads.
        """
        tensors = (weight, left, right, out)
        pointers = [tensor.data_ptr() for tensor in tensors]
        self._add_product(*pointers, len(left), len(right), right.shape[1], torch.get_num_threads())


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
