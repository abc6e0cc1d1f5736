"""Matrices in 8 or 4 bits: each row in blocks, each block with a scale, and a zero point where it is asymmetric.

A value is (q − z)·s with q of 0 to 2^bits − 1, rounded to the nearest; z is 2^(bits − 1) where a block has none of its
own. The bytes are those that ONNX Runtime's ``MatMulNBits`` and ``GatherBlockQuantized`` read, and its own kernel
writes them: equal matrices give equal bytes. What came as places in a table of levels (NF4) is level[q]·s, in the bytes
of ``MatMulBnb4``, which are bitsandbytes' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lorac.frontend.quantised_weights import QUANTISATION_LEVELS, QuantisedMatrix

Array = npt.NDArray[Any]
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""How many values may share a scale."""
ACCURACY_ATTRIBUTE = "accuracy_level"
"""The attribute of a quantised product that says in what it is computed."""


@dataclass(frozen=True)
class Codec:
    """How matrices are quantised.

    Attributes:
        bits: 8 or 4.
        block: how many values of a row share a scale.
        symmetric: zero is in the middle of every block's range; else each block has a zero point.
        table: whose levels the numbers are places of (``lorac.frontend.quantised_weights.QUANTISATION_LEVELS``); empty
        where they are numbers.
    """

    bits: int
    block: int
    symmetric: bool
    table: str = ""

    @property
    def name(self) -> str:
        """What such weights are called: ``int4``."""
        return self.table or f"int{self.bits}"

    def why_not(self, columns: int) -> str | None:
        """Why rows of so many values stay as they are; None where they can be quantised."""
        return f"rows shorter than a block of {self.block}" if columns < self.block else None

    @classmethod
    def of(cls, codes: QuantisedMatrix, block: int) -> Codec | None:
        """The codec whose blocks hold given codes as they are; None where none does.

        Args:
            codes: of a matrix that came quantised.
            block: how many values share a scale where whole rows do.
        """
        group, columns = codes.group, codes.whole.shape[1]
        size = block if group == columns else group
        fits = size in BLOCK_SIZES and (group == columns or columns % size == 0)
        return cls(codes.bits, size, codes.zero is None, codes.table) if fits and columns >= size else None

    def take(self, codes: QuantisedMatrix) -> EncodedMatrix:
        """Codes as they are; what fills up the last block of a row counts as 0."""
        rows, columns = codes.whole.shape
        blocks, middle = -(-columns // self.block), 1 << self.bits - 1
        repeated = blocks // codes.scale.shape[1]
        scales = np.repeat(codes.scale.float().numpy(), repeated, 1)
        zeros = np.full(scales.shape, middle, np.uint8)
        if codes.zero is not None:
            zeros = np.repeat(codes.zero.long().numpy() + middle, repeated, 1).astype(np.uint8)
        whole = np.repeat(zeros, self.block, 1)
        whole[:, :columns] = (codes.whole.long().numpy() + middle).astype(np.uint8)
        packed = self._packed(whole).reshape(rows, blocks, -1)
        return EncodedMatrix(self, columns, packed, scales, None if self.symmetric else self._packed(zeros))

    def _packed(self, whole: Array) -> Array:
        """Numbers along the last axis packed into bytes, of 4 bits two in each."""
        if self.bits == 8:
            return whole
        even = np.pad(whole, ((0, 0), (0, whole.shape[1] % 2)))
        low, high = (even[:, 1::2], even[:, ::2]) if self.table else (even[:, ::2], even[:, 1::2])
        return low | high << 4

    def encode(self, matrix: Array) -> EncodedMatrix:
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
        return EncodedMatrix(self, columns, packed, scales.reshape(rows, blocks), own_zeros)


@dataclass(frozen=True, eq=False)
class EncodedMatrix:
    """A quantised matrix.

    Attributes:
        codec: how it was quantised.
        columns: how many values a row has.
        packed: (rows, blocks, bytes of a block); of 4 bits the even values are in the lower halves of bytes, and in the
            upper ones where they are of a table.
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

    def rows(self, begin: int, count: int) -> EncodedMatrix:
        """Some rows of it, where they lie."""
        cut = {name: part[begin : begin + count] for name, part in self.parts().items()}
        return EncodedMatrix(self.codec, self.columns, **cut)

    def decode(self) -> Array:
        """The float32 matrix (rows, columns) that products are taken with."""
        rows, blocks, _ = self.packed.shape
        values = self._spread(self.packed)
        if self.codec.table:
            levels = np.array(QUANTISATION_LEVELS[self.codec.table], np.float32)[values.astype(np.int64)]
            return (levels * self.scales[:, :, None]).reshape(rows, -1)[:, : self.columns]
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
        halves = (packed >> 4, packed & 15) if self.codec.table else (packed & 15, packed >> 4)
        spread[..., 0], spread[..., 1] = halves
        return spread.reshape(*packed.shape[:-1], -1)


def stack_rows(parts: Sequence[EncodedMatrix]) -> EncodedMatrix:
    """Matrices of one width and codec under one another."""
    if len(parts) == 1:
        return parts[0]
    stacked = {name: np.concatenate([part.parts()[name] for part in parts]) for name in parts[0].parts()}
    return EncodedMatrix(parts[0].codec, parts[0].columns, **stacked)
