"""Options of targets that can store base weights in 8 or 4 bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from lorac.backends.onnx.quantised.algorithms import ALGORITHMS, GPTQ, K_QUANT, RTN
from lorac.backends.onnx.quantised.codec import BLOCK_SIZES, FLOAT32_LEVEL, INT8_LEVEL, Codec
from lorac.errors import OptionError, not_one_of, short
from lorac.target.backend import TargetOptions

_WEIGHT_BITS = {"int8": 8, "int4": 4}
"""Storage of quantised weights -> bits of a value."""
_CODE_OPTIONS = ("head", "mixed", "algorithm", "calibration")
"""Options that say how codes are chosen; those of a pre-quantised weight are there already."""


@dataclass(frozen=True, kw_only=True)
class QuantisationOptions(TargetOptions):
    """Options for the storage of base weights.

    Attributes:
        weights: ``"int8"`` or ``"int4"``: weights of linear layers, output layers and embeddings are quantised, and
            adapters run next to them in float. ``explain()`` says which stay float, and why. The base is the
            dequantised weights, also for methods that read W; in mode ``"baked"`` the adapters are merged in float
            first.
        head: ``"int8"`` or ``"int4"``, of output layers as large as an embedding, and of an embedding that is tied to
            one; default: ``"int8"``, since a model loses most by rounding these.
        mixed: with ``weights="int4"``, the first and the last layers, by which a model loses most, are stored in eight
            bits, up to a tenth more bytes in all. Default: True.
        algorithm: how codes are chosen. ``"rtn"``: rounding to the nearest. ``"k_quant"``: the scales and zero points
            of llama.cpp. ``"gptq"``: each column's error is made up for by the columns after it, which takes calls of
            the model and is the most accurate.
        calibration: calls of the model for ``"gptq"``, each its arguments by name, such as a tokenizer's answer for a
            text; default: texts that a causal language model of transformers writes by itself.
        block_size: the number of values of a row that share a scale: 16, 32, 64, 128 or 256.
        symmetric: zero is in the middle of each block's range; False gives each block a zero point of its own, and is a
            little larger and slower. Default: as the algorithm does; ``"k_quant"`` always has zero points.
        accuracy_level: the least precision of products with quantised weights. 1 rounds nothing; 4 rounds their operand
            to int8, block by block, which is fastest. None: 4 with ``weights=``, and 1 for pre-quantised weights.
    """

    quantisation: ClassVar[tuple[str, ...]] = ("accuracy_level", "block_size", "symmetric", *_CODE_OPTIONS)
    """The options that say how weights are quantised."""
    accuracy_levels: ClassVar[tuple[int | None, ...]] = (None, FLOAT32_LEVEL, INT8_LEVEL)
    local: ClassVar[tuple[str, ...]] = ("calibration",)
    weights: str | None = None
    head: str | None = None
    mixed: bool | None = None
    algorithm: str = RTN
    calibration: tuple[Mapping[str, object], ...] = ()
    block_size: int = 32
    symmetric: bool | None = None
    accuracy_level: int | None = None

    @property
    def codec(self) -> Codec | None:
        """The codec of quantised weights; None if no weight is quantised."""
        return None if self.weights is None else self._codec(self.weights)

    @property
    def head_codec(self) -> Codec | None:
        """The codec of quantised output layers; None if no weight is quantised."""
        return None if self.weights is None else self._codec(self.head or "int8")

    @property
    def is_mixed(self) -> bool:
        """Whether some of the 4-bit weights are stored in 8 bits."""
        return self.weights == "int4" and self.mixed is not False

    def _codec(self, weights: str) -> Codec:
        symmetric = self.algorithm != K_QUANT if self.symmetric is None else self.symmetric
        return Codec(_WEIGHT_BITS[weights], self.block_size, symmetric)

    @property
    def product_level(self) -> int:
        """The accuracy level of products with quantised weights."""
        default = FLOAT32_LEVEL if self.weights is None else INT8_LEVEL
        return default if self.accuracy_level is None else self.accuracy_level

    def check_weights(self) -> None:
        """Raise ``OptionError`` for an unknown quantisation."""
        for name, stored in (("weights", self.weights), ("head", self.head)):
            if stored is not None and stored not in _WEIGHT_BITS:
                raise not_one_of(f"{name} cannot be stored as", stored, tuple(_WEIGHT_BITS))
        self._refuse_idle(_CODE_OPTIONS)
        if self.mixed and self.weights != "int4":
            raise OptionError(
                f"mixed=True stores some weights in 8 bits, and weights='{self.weights}' stores all of them so",
                next_step="leave mixed= out, or give weights='int4'",
            )
        if self.algorithm not in ALGORITHMS:
            raise not_one_of("codes cannot be chosen by", self.algorithm, ALGORITHMS)
        if self.algorithm == K_QUANT and self.symmetric:
            raise OptionError(
                "symmetric=True contradicts algorithm='k_quant', whose blocks have zero points",
                next_step="leave symmetric= out, or take algorithm='gptq'",
            )
        if self.calibration and self.algorithm != GPTQ:
            raise OptionError(
                f"algorithm={self.algorithm!r} does not read calibration=",
                next_step="give algorithm='gptq' with it, or leave it out",
            )
        self.check_among("block_size", BLOCK_SIZES)
        self.check_among("accuracy_level", self.accuracy_levels)

    def check_among(self, name: str, known: Sequence[int | None]) -> None:
        """Raise ``OptionError`` if an option's value is not among the known numbers."""
        if getattr(self, name) not in known:
            raise OptionError(
                f"{name} cannot be {short(getattr(self, name))}", next_step=f"it is one of {', '.join(map(str, known))}"
            )

    def check_quantisation(self) -> None:
        """Raise ``OptionError`` for options about quantised weights if no weight is quantised."""
        self._refuse_idle(self.quantisation)

    def _refuse_idle(self, names: Sequence[str]) -> None:
        """Raise ``OptionError`` if one of these options is set though this program's weights are not quantised."""
        idle = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        if self.weights is None and idle:
            raise OptionError(
                f"{idle[0]}= sets how weights are quantised, and no weights are quantised",
                next_step="give weights='int8' or weights='int4' with it",
            )


MAX_THREADS = 1024
"""More threads than a machine has cores for one operator; each takes memory of its own."""


def check_threads(threads: int) -> None:
    """Raise ``OptionError`` for an invalid number of threads; 0 lets the library choose."""
    if not 0 <= threads <= MAX_THREADS:
        raise OptionError(
            f"threads cannot be {short(threads)}", next_step=f"give a number up to {MAX_THREADS}, or 0 for all"
        )
