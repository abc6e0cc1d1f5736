"""Matrices in 8 or 4 bits: each row in blocks, each block with a scale, and a zero point where it is asymmetric.

A value is (q − z)·s with q of 0 to 2^bits − 1, rounded to the nearest; z is 2^(bits − 1) where a block has none of its
own. The bytes are those that ONNX Runtime's ``MatMulNBits`` and ``GatherBlockQuantized`` read, and its own kernel
writes them: equal matrices give equal bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
ACCURACY = "accuracy_level"
"""The attribute of a quantised product that says in what it is computed."""


@dataclass(frozen=True)
class Codec:
    """How matrices are quantised.

    Attributes:
        bits: 8 or 4.
        block: how many values of a row share a scale.
        symmetric: zero is in the middle of every block's range; else each block has a zero point.
    """

    bits: int
    block: int
    symmetric: bool

    @property
    def name(self) -> str:
        """What such weights are called: ``int4``."""
        return f"int{self.bits}"

    def why_not(self, columns: int) -> str | None:
        """Why rows of so many values stay as they are; None where they can be quantised."""
        return f"rows shorter than a block of {self.block}" if columns < self.block else None

    def encode(self, matrix: Array) -> Encoded:
        """A float32 matrix (rows, columns); the last block of a row is filled up with zeros."""
        from onnxruntime.capi import _pybind_state as library

        rows, columns = matrix.shape
        blocks = -(-columns // self.block)
        by_columns = np.zeros((blocks * self.block, rows), np.float32)
        by_columns[:columns] = matrix.T
        packed = np.zeros((rows, blocks, self.block * self.bits // 8), np.uint8)
        scales = np.zeros(rows * blocks, np.float32)
        zeros = np.zeros(rows * -(-blocks * self.bits // 8), np.uint8)
        kernel = {4: library.quantize_matmul_4bits, 8: library.quantize_matmul_8bits}[self.bits]
        kernel(packed, by_columns, scales, zeros, self.block, rows, len(by_columns), self.symmetric)
        own_zeros = None if self.symmetric else zeros.reshape(rows, -1)
        return Encoded(self, columns, packed, scales.reshape(rows, blocks), own_zeros)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A quantised matrix.

    Attributes:
        codec: how it was quantised.
        columns: how many values a row has.
        packed: (rows, blocks, bytes of a block); of 4 bits the even values are in the lower halves of bytes.
        scales: (rows, blocks), float32.
        zeros: (rows, bytes), packed as the values are; None where it is symmetric.
    """

    codec: Codec
    columns: int
    packed: Array
    scales: Array
    zeros: Array | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return len(self.packed), self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        return sum(int(part.nbytes) for part in self.parts().values())

    def parts(self) -> dict[str, Array]:
        """Its arrays by name."""
        found = {"packed": self.packed, "scales": self.scales, "zeros": self.zeros}
        return {name: part for name, part in found.items() if part is not None}

    def rows(self, begin: int, count: int) -> Encoded:
        """Some rows of it, where they lie."""
        cut = {name: part[begin : begin + count] for name, part in self.parts().items()}
        return Encoded(self.codec, self.columns, **cut)

    def decode(self) -> Array:
        """The float32 matrix (rows, columns) that products are taken with."""
        rows, blocks, _ = self.packed.shape
        values = self._spread(self.packed)
        middle = np.float32(1 << self.codec.bits - 1)
        zeros = middle if self.zeros is None else self._spread(self.zeros)[:, :blocks, None]
        # The zero point goes first, in whole numbers, as the kernels have it: then one rounding is left.
        values -= zeros
        values *= self.scales[:, :, None]
        return values.reshape(rows, -1)[:, : self.columns]

    def _spread(self, packed: Array) -> Array:
        """Packed numbers as float32, one after the other along the last axis."""
        if self.codec.bits == 8:
            return packed.astype(np.float32)
        spread = np.empty((*packed.shape[:-1], packed.shape[-1], 2), np.float32)
        spread[..., 0], spread[..., 1] = packed & 15, packed >> 4
        return spread.reshape(*packed.shape[:-1], -1)
