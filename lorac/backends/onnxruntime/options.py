"""Options of the onnxruntime target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnxruntime
import torch

from lorac.backends.onnx.thread_count import check_threads
from lorac.backends.onnxruntime.devices.providers import CPU, CUDA, device_type_of, known_providers
from lorac.backends.onnxruntime.quantised.algorithms import ALGORITHMS, GPTQ, K_QUANT, RTN
from lorac.backends.onnxruntime.quantised.codec import BLOCK_SIZES, Codec
from lorac.errors import MissingExtra, OptionError, check_release, nearest_name, not_one_of, short
from lorac.native_library import NativeLibrary, find_native_library
from lorac.target.backend import TargetOptions

_PROVIDERS = {"cpu": CPU, "cuda": CUDA}
"""Type of device -> its default provider."""
_SETTLE_TIMES = ("asked", "background")
_WEIGHT_BITS = {"int8": 8, "int4": 4}
"""Storage of quantised weights -> bits of a value."""
FLOAT32_LEVEL = 1
"""The accuracy level of products that round nothing."""
INT8_LEVEL = 4
"""The accuracy level of products that round their operand to int8."""
_ACCURACY_LEVELS = (None, 0, FLOAT32_LEVEL, 2, 3, INT8_LEVEL)
_CACHE_RELEASE = "1.32"
"""The first release whose GroupQueryAttention takes rows of several lengths, which a cache needs."""
FLOAT16 = "float16"
"""The value of ``native`` with which factors are float16."""
_NATIVE = ("auto", True, False, FLOAT16)
_CODE_OPTIONS = ("head", "mixed", "algorithm", "calibration")
"""Options that say how codes are chosen; those of a pre-quantised weight are there already."""
_QUANTISATION_OPTIONS = ("block_size", "symmetric", "accuracy_level", *_CODE_OPTIONS)
"""Options that say how weights are quantised."""


@dataclass(frozen=True, kw_only=True)
class OnnxRuntimeOptions(TargetOptions):
    """Options of the onnxruntime target.

    Attributes:
        threads: threads of one operator, 0 for ONNX Runtime's own choice.
        spinning: how threads wait for the next operator. None: busily for some microseconds, and only within a call,
            which is as long as small operators take to follow one another; True: busily for as long as ONNX Runtime's
            default, between calls too, which slows down everything else on the machine; False: asleep, which is best
            where other processes want the cores.
        settle: ``"asked"``: weights settle when ``swap(..., settle=True)`` asks; ``"background"``: after every swap.
        cache: keep keys and values, as ``generate`` needs it, of a causal language model of transformers. Calls then
            take ``input_ids`` and an ``attention_mask`` that pads rows on the right; logits of padding are 0.
        branch_rows: rows of a call may have branches of their own, such as routers, in the same call. This makes
            compiling slower, and calls of several tokens with one choice of branches too; without it rows are
            computed by choice.
        portable: slots are inputs that each call must give, and not optional ones, so that the saved program can be
            switched by every runtime of ONNX, in browsers and Node.js too. The base's values of all slots, and each
            adapter's, are written as safetensors.
        providers: execution providers, best first; default: those of the device.
        device: where sessions run, ``"cpu"``, ``"cuda"`` or ``"cuda:1"``, as in ``compile(device=)``;
            default: where the first of the providers runs.
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
        accuracy_level: the least precision of products: 1 float32, 2 float16, 3 bfloat16; 4 rounds their operand to
            int8, block by block, which is fastest on CPUs; 0 leaves it to the execution provider, whose CPU takes
            float32. None: 4 with ``weights=``, and 1 for pre-quantised weights, whose own products round nothing.
        native: whether sessions on the CPU add low-rank adapters by the op of lorac-native instead of ONNX Runtime's
            own ops: ``"auto"`` where it is installed; True always; False never; ``"float16"`` always, with factors
            in float16, which are read in half the time and rounded by up to 5e-4 of their values. It belongs to this
            machine: a saved program has ONNX Runtime's own ops.
        prepacked: a folder for the weights as the CPU's kernels read them, about twice their bytes on disk. They are
            written when the program first runs, and mapped from then on, so that a process has no copy of its own in
            memory, and several share one. It belongs to this machine and is not part of an artifact. None: no folder.
    """

    running: ClassVar[tuple[str, ...]] = ("threads", "spinning", "settle", "providers", "native", "prepacked")
    local: ClassVar[tuple[str, ...]] = ("calibration", "native", "prepacked")
    threads: int = 0
    spinning: bool | None = None
    settle: str = "asked"
    cache: bool = False
    branch_rows: bool = False
    portable: bool = False
    providers: tuple[str, ...] | None = None
    device: str | None = None
    weights: str | None = None
    head: str | None = None
    mixed: bool | None = None
    algorithm: str = RTN
    calibration: tuple[Mapping[str, object], ...] = ()
    block_size: int = 32
    symmetric: bool | None = None
    accuracy_level: int | None = None
    native: bool | str = "auto"
    prepacked: str | Path | None = None

    @property
    def codec(self) -> Codec | None:
        """The codec of quantised weights, or None."""
        return None if self.weights is None else self._codec(self.weights)

    @property
    def head_codec(self) -> Codec | None:
        """The codec of quantised output layers, or None."""
        return None if self.weights is None else self._codec(self.head or "int8")

    @property
    def is_mixed(self) -> bool:
        """Whether some of 4-bit weights are stored in 8."""
        return self.weights == "int4" and self.mixed is not False

    def _codec(self, weights: str) -> Codec:
        symmetric = self.algorithm != K_QUANT if self.symmetric is None else self.symmetric
        return Codec(_WEIGHT_BITS[weights], self.block_size, symmetric)

    @property
    def product_level(self) -> int:
        """The accuracy level of products with quantised weights."""
        default = FLOAT32_LEVEL if self.weights is None else INT8_LEVEL
        return default if self.accuracy_level is None else self.accuracy_level

    @property
    def place(self) -> torch.device:
        """The device that sessions run on."""
        if self.device is not None:
            return torch.device(self.device)
        return torch.device("cpu" if self.providers is None else device_type_of(self.providers[0]))

    @property
    def chosen(self) -> tuple[str, ...]:
        """The providers of a session, best first; the CPU computes the ops that none of them takes."""
        best = (_PROVIDERS[self.place.type],) if self.providers is None else self.providers
        return tuple(dict.fromkeys((*best, CPU)))

    @property
    def uses_cache(self) -> bool:
        return self.cache

    def check(self) -> None:
        check_threads(self.threads)
        if self.cache:
            found, otherwise = onnxruntime.__version__, "compile without cache=True"
            check_release("generation over a cache", "onnxruntime", found, _CACHE_RELEASE, otherwise=otherwise)
        self._check_weights()
        self._check_device()
        self._check_native()
        if self.prepacked is not None and self.chosen != (CPU,):
            raise OptionError(
                f"prepacked= keeps weights for the CPU, and sessions run on {self.chosen[0]}",
                next_step="leave prepacked= out, or give device='cpu'",
            )
        if self.settle not in _SETTLE_TIMES:
            raise not_one_of("settle cannot be", self.settle, _SETTLE_TIMES)

    def _check_device(self) -> None:
        """Raise ``OptionError`` for devices and providers that do not exist or contradict each other."""
        known = known_providers()
        strange = [provider for provider in self.providers or () if provider not in known]
        if strange or self.providers == ():
            raise OptionError(
                f"ONNX Runtime has no provider {strange[0]!r}" if strange else "providers= is empty",
                nearest=nearest_name(strange[0], known) if strange else None,
                next_step="leave providers= out to run on device=",
            )
        if self.device is None:
            return
        if self.place.type not in _PROVIDERS:
            raise not_one_of("onnxruntime does not run on", self.device, tuple(_PROVIDERS))
        if self.providers is not None and device_type_of(self.providers[0]) != self.place.type:
            raise OptionError(
                f"device={self.device!r} and providers={self.providers!r} contradict each other: "
                f"{self.providers[0]} runs on {device_type_of(self.providers[0])!r}",
                next_step=f"leave providers= out: device={self.device!r} takes {_PROVIDERS[self.place.type]}",
            )

    def _check_weights(self) -> None:
        """Raise ``OptionError`` for a way of quantising that does not exist."""
        for name, stored in (("weights", self.weights), ("head", self.head)):
            if stored is not None and stored not in _WEIGHT_BITS:
                raise not_one_of(f"{name} cannot be stored as", stored, tuple(_WEIGHT_BITS))
        self._refuse_idle(_CODE_OPTIONS)
        if self.mixed and self.weights != "int4":
            raise OptionError(
                f"mixed=True stores some of the weights in 8 bits, as weights='{self.weights}' stores all",
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
                f"calibration= is not read by algorithm={self.algorithm!r}",
                next_step="give algorithm='gptq' with it, or leave it out",
            )
        for name, known in (("block_size", BLOCK_SIZES), ("accuracy_level", _ACCURACY_LEVELS)):
            if getattr(self, name) not in known:
                raise OptionError(
                    f"{name} cannot be {short(getattr(self, name))}",
                    next_step=f"it is one of {', '.join(map(str, known))}",
                )

    @property
    def native_library(self) -> NativeLibrary | None:
        """The library whose op sessions use; None where they use ONNX Runtime's own ops."""
        return find_native_library() if self.may_use_native else None

    @property
    def may_use_native(self) -> bool:
        """Whether the op of lorac-native is used where it is installed."""
        return bool(self.native) and self.chosen == (CPU,)

    def _check_native(self) -> None:
        """Raise an error for an op that is asked for and cannot be used."""
        if self.native not in _NATIVE:
            raise not_one_of("native cannot be", self.native, tuple(map(repr, _NATIVE)))
        if self.native in ("auto", False):
            return
        if self.chosen != (CPU,):
            raise OptionError(
                f"native={self.native!r} asks for an op that runs on the CPU, and sessions run on {self.chosen[0]}",
                next_step="leave native= out, or give device='cpu'",
            )
        if find_native_library() is None:
            raise MissingExtra("lorac-native")

    def check_quantisation(self) -> None:
        """Raise ``OptionError`` for options about quantised weights where no weight is quantised."""
        self._refuse_idle(_QUANTISATION_OPTIONS)

    def _refuse_idle(self, names: Sequence[str]) -> None:
        """Raise ``OptionError`` for one of these options where this program's weights are not quantised."""
        idle = [name for name in names if getattr(self, name) != getattr(type(self), name)]
        if self.weights is None and idle:
            raise OptionError(
                f"{idle[0]}= says how weights are quantised, and none are",
                next_step="give weights='int8' or weights='int4' with it",
            )
