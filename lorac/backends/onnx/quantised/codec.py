"""Matrices in 8 or 4 bits: rows in blocks, each block with a scale and, if asymmetric, a zero point.

A value is (q − z)·s with q from 0 to 2^bits − 1, rounded to the nearest; z is 2^(bits − 1) in a symmetric block. The
bytes have the layout that ONNX Runtime's ``MatMulNBits`` and ``GatherBlockQuantized`` read. ONNX Runtime's own kernel
writes them, so equal matrices give equal bytes. With a table of levels (NF4) the value is level[q]·s, in the byte
layout of ``MatMulBnb4``, which is bitsandbytes' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lorac.frontend.quantised_weights import QUANTISATION_LEVELS, QuantisedMatrix

Array = np.ndarray
BLOCK_SIZES = (16, 32, 64, 128, 256)
"""The numbers of values that may share a scale."""
ACCURACY_ATTRIBUTE = "accuracy_level"
"""The attribute of a quantised product that says in which precision it computes."""
FLOAT32_LEVEL = 1
"""The accuracy level of products that round nothing."""
INT8_LEVEL = 4
"""The accuracy level of products that round their operand to int8."""


@dataclass(frozen=True)
class Codec:
    """A quantisation scheme for matrices.

    Attributes:
        bits: 8 or 4.
        block: the number of values in a row that share a scale.
        symmetric: whether zero is in the middle of every block's range; otherwise each block has a zero point.
        table: the name of the table of levels that codes index
            (``lorac.frontend.quantised_weights.QUANTISATION_LEVELS``); empty if codes are numbers.
    """

    bits: int
    block: int
    symmetric: bool
    table: str = ""

    @property
    def name(self) -> str:
        """The name of the scheme: ``int4``."""
        return self.table or f"int{self.bits}"

    def why_not(self, columns: int) -> str | None:
        """Return the reason why rows with so many values cannot be quantised; None if they can."""
        return f"rows shorter than a block of {self.block}" if columns < self.block else None

    @classmethod
    def of(cls, codes: QuantisedMatrix, block: int) -> Codec | None:
        """Return the codec that can store the given codes unchanged; None if there is none.

        Args:
            codes: the codes of a pre-quantised matrix.
            block: the block size to use if whole rows share a scale.
        """
        group, columns = codes.group, codes.whole.shape[1]
        size = block if group == columns else group
        fits = size in BLOCK_SIZES and (group == columns or columns % size == 0)
        return cls(codes.bits, size, codes.zero is None, codes.table) if fits and columns >= size else None

    def take(self, codes: QuantisedMatrix) -> EncodedMatrix:
        """Store codes unchanged, with each row padded to whole blocks."""
        columns, middle = codes.whole.shape[1], 1 << self.bits - 1
        repeated = -(-columns // self.block) // codes.scale.shape[1]
        scales = np.repeat(codes.scale.float().numpy(), repeated, 1)
        zeros = np.full(scales.shape, middle, np.uint8)
        if codes.zero is not None:
            zeros = np.repeat(codes.zero.long().numpy() + middle, repeated, 1).astype(np.uint8)
        return self.pack((codes.whole.long().numpy() + middle).astype(np.uint8), scales, zeros)

    def pack(self, whole: Array, scales: Array, zeros: Array) -> EncodedMatrix:
        """Pack the given codes into a matrix, with each row padded to whole blocks.

        Args:
            whole: (rows, columns), uint8.
            scales: (rows, blocks), float32.
            zeros: (rows, blocks), uint8; in a symmetric codec all are 2^(bits − 1).
        """
        columns = whole.shape[1]
        padded = np.repeat(zeros, self.block, 1)
        padded[:, :columns] = whole
        packed = self._packed(padded).reshape(*scales.shape, -1)
        return EncodedMatrix(self, columns, packed, scales, None if self.symmetric else self._packed(zeros))

    def count_bytes(self, shape: tuple[int, int]) -> int:
        """Return the size in bytes of a quantised matrix (rows, columns)."""
        rows, columns = shape
        blocks = -(-columns // self.block)
        zeros = 0 if self.symmetric else -(-blocks * self.bits // 8)
        return rows * (blocks * (self.block * self.bits // 8 + np.dtype(np.float32).itemsize) + zeros)

    def _packed(self, whole: Array) -> Array:
        """Pack codes along the last axis into bytes, two 4-bit codes per byte."""
        if self.bits == 8:
            return whole
        even = np.pad(whole, ((0, 0), (0, whole.shape[1] % 2)))
        low, high = (even[:, 1::2], even[:, ::2]) if self.table else (even[:, ::2], even[:, 1::2])
        return low | high << 4

    def encode(self, matrix: Array) -> EncodedMatrix:
        """Quantise a float32 matrix (rows, columns), with each row padded with zeros to whole blocks."""
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
        codec: the scheme of the quantisation.
        columns: the number of values per row.
        packed: (rows, blocks, bytes per block); for 4 bits, even values are in the low halves of bytes, or with a table
            in the high halves.
        scales: (rows, blocks), float32.
        zeros: (rows, bytes), packed like the values; None if symmetric.
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
        """The size in bytes of all arrays."""
        return sum(int(part.nbytes) for part in self.parts().values())

    def parts(self) -> dict[str, Array]:
        """Return the arrays by name."""
        found = {"packed": self.packed, "scales": self.scales, "zeros": self.zeros}
        return {name: part for name, part in found.items() if part is not None}

    def rows(self, begin: int, count: int) -> EncodedMatrix:
        """Return a view of a range of rows."""
        cut = {name: part[begin : begin + count] for name, part in self.parts().items()}
        return EncodedMatrix(self.codec, self.columns, **cut)

    def decode(self) -> Array:
        """Return the dequantised float32 matrix (rows, columns)."""
        rows, blocks, _ = self.packed.shape
        values = self._spread(self.packed)
        if self.codec.table:
            levels = np.array(QUANTISATION_LEVELS[self.codec.table], np.float32)[values.astype(np.int64)]
            return (levels * self.scales[:, :, None]).reshape(rows, -1)[:, : self.columns]
        middle = np.float32(1 << self.codec.bits - 1)
        zeros = middle if self.zeros is None else self._spread(self.zeros)[:, :blocks, None]
        # Subtract the zero point first, between integers, as the kernels do; then only one rounding remains.
        values -= zeros
        values *= self.scales[:, :, None]
        return values.reshape(rows, -1)[:, : self.columns]

    def _spread(self, packed: Array) -> Array:
        """Unpack numbers to float32 along the last axis."""
        if self.codec.bits == 8:
            return packed.astype(np.float32)
        spread = np.empty((*packed.shape[:-1], packed.shape[-1], 2), np.float32)
        halves = (packed >> 4, packed & 15) if self.codec.table else (packed & 15, packed >> 4)
        spread[..., 0], spread[..., 1] = halves
        return spread.reshape(*packed.shape[:-1], -1)


def stack_rows(parts: Sequence[EncodedMatrix]) -> EncodedMatrix:
    """Concatenate the rows of matrices with equal width and codec."""
    if len(parts) == 1:
        return parts[0]
    stacked = {name: np.concatenate([part.parts()[name] for part in parts]) for name in parts[0].parts()}
    return EncodedMatrix(parts[0].codec, parts[0].columns, **stacked)
