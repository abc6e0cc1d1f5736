"""The report of a program's quantisation: the quantised matrices, and the float ones with the reason for each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lorac.backends.onnx.quantised.codec import FLOAT32_LEVEL, INT8_LEVEL, Array, EncodedMatrix
from lorac.errors import list_some
from lorac.ir.graph.graph import Skip
from lorac.ir.graph.passes import PassResult
from lorac.report.terms import format_size

_FLOAT_BYTES, _SHOWN_NAMES = 4, 3
"""Bytes of a float32; the number of names that a note lists."""


@dataclass(frozen=True, eq=False)
class QuantisedProduct:
    """A quantised matrix of a program.

    Attributes:
        encoded: its codes, (out, in) for products and (ids, width) for lookups.
        by_columns: whether the program had its transpose.
        source: the program's original constant.
        names: part of ``encoded`` -> the constant that stores this part.
    """

    encoded: EncodedMatrix
    by_columns: bool
    source: ir.TensorProtocol
    names: Mapping[str, str]

    def original(self) -> Array:
        """Return the original matrix in the orientation of ``encoded``."""
        matrix: Array = self.source.numpy()
        return matrix.T if self.by_columns else matrix


@dataclass(frozen=True)
class QuantisationReport:
    """The quantised and the float constants of a program after the pass.

    Attributes:
        quantised: name of a constant -> the quantised matrix that replaced it.
        floats: name of an unchanged constant, or of the module that reads it -> the reason.
        accuracy_level: the precision of products (``QuantisationOptions.product_level``).
        uncalibrated: the layers whose codes were rounded to the nearest, since no call of the calibration reaches them.
        has_head: whether an output layer as large as an embedding is quantised.
    """

    quantised: Mapping[str, QuantisedProduct]
    floats: Mapping[str, str]
    accuracy_level: int
    uncalibrated: Sequence[str] = ()
    has_head: bool = False

    def to_result(self) -> PassResult:
        """Return the result of the pass, with the report as its details."""
        encoded, notes = [product.encoded for product in self.quantised.values()], list[str]()
        for codec in dict.fromkeys(one.codec for one in encoded):
            alike = [one for one in encoded if one.codec == codec]
            before = sum(math.prod(one.shape) * _FLOAT_BYTES for one in alike)
            kind = "" if codec.table else "symmetric, " if codec.symmetric else "asymmetric, "
            notes.append(
                f"weights: {len(alike)} stored as {codec.name}, {kind}in blocks of {codec.block}: "
                f"{format_size(sum(one.nbytes for one in alike))} for {format_size(before)}"
            )
        if self.accuracy_level == INT8_LEVEL and any(not one.codec.table for one in encoded):
            notes.append(
                f"products with them round what they read to int8; accuracy_level={FLOAT32_LEVEL} rounds nothing, and "
                "can be faster where a call has some hundred tokens or more"
            )
        if self.uncalibrated:
            layers = list_some(self.uncalibrated, _SHOWN_NAMES, quote="")
            notes.append(f"weights rounded to the nearest, since no call reaches them: {layers}")
        for reason in dict.fromkeys(self.floats.values()):
            names = [name for name, why in self.floats.items() if why == reason]
            notes.append(f"weights that stay as they are, {reason}: {list_some(names, _SHOWN_NAMES, quote='')}")
        skipped = tuple(Skip(name, why) for name, why in self.floats.items())
        return PassResult(bool(self.quantised), skipped, tuple(notes), details=self)
