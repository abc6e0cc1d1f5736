"""Options of the onnxruntime target."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnxruntime
import torch

from lorac.backends.onnx.quantised.codec import FLOAT32_LEVEL, INT8_LEVEL
from lorac.backends.onnx.quantised.options import QuantisationOptions, check_threads
from lorac.backends.onnxruntime.devices.providers import CPU, CUDA, device_type_of, known_providers
from lorac.errors import MissingExtra, OptionError, check_release, nearest_name, not_one_of
from lorac.native_library import NativeLibrary, find_native_library

_PROVIDERS = {"cpu": CPU, "cuda": CUDA}
"""Type of device -> its default provider."""
_SETTLE_TIMES = ("asked", "background")
_CACHE_RELEASE = "1.32"
"""The first release whose GroupQueryAttention takes rows of several lengths, which a cache needs."""
FLOAT16 = "float16"
"""The value of ``native`` with which factors are float16."""
_NATIVE = ("auto", True, False, FLOAT16)


@dataclass(frozen=True, kw_only=True)
class OnnxRuntimeOptions(QuantisationOptions):
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
        accuracy_level: also 2, float16, and 3, bfloat16; 0 leaves it to the execution provider, and the CPU's takes
            float32.
        native: whether sessions on the CPU add low-rank adapters by the op of lorac-native instead of ONNX Runtime's
            own ops: ``"auto"`` where it is installed; True always; False never; ``"float16"`` always, with factors
            in float16, which are read in half the time and rounded by up to 5e-4 of their values. It belongs to this
            machine: a saved program has ONNX Runtime's own ops.
        prepacked: a folder for the weights as the CPU's kernels read them, about twice their bytes on disk. They are
            written when the program first runs, and mapped from then on, so that a process has no copy of its own in
            memory, and several share one. It belongs to this machine and is not part of an artifact. None: no folder.
    """

    running: ClassVar[tuple[str, ...]] = ("threads", "spinning", "settle", "providers", "native", "prepacked")
    local: ClassVar[tuple[str, ...]] = (*QuantisationOptions.local, "native", "prepacked")
    accuracy_levels: ClassVar[tuple[int | None, ...]] = (None, 0, FLOAT32_LEVEL, 2, 3, INT8_LEVEL)
    threads: int = 0
    spinning: bool | None = None
    settle: str = "asked"
    cache: bool = False
    branch_rows: bool = False
    portable: bool = False
    providers: tuple[str, ...] | None = None
    device: str | None = None
    native: bool | str = "auto"
    prepacked: str | Path | None = None

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

    def check(self) -> None:
        check_threads(self.threads)
        if self.cache:
            found, otherwise = onnxruntime.__version__, "compile without cache=True"
            check_release("generation over a cache", "onnxruntime", found, _CACHE_RELEASE, otherwise=otherwise)
        self.check_weights()
        self._check_device()
        if self.native not in _NATIVE:
            raise not_one_of("native cannot be", self.native, tuple(map(repr, _NATIVE)))
        if self.native not in ("auto", False):
            if self.chosen != (CPU,):
                raise OptionError(
                    f"native={self.native!r} asks for an op that runs on the CPU, and sessions run on {self.chosen[0]}",
                    next_step="leave native= out, or give device='cpu'",
                )
            if find_native_library() is None:
                raise MissingExtra("lorac-native")
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

    @property
    def native_library(self) -> NativeLibrary | None:
        """The library whose op sessions use; None if they use ONNX Runtime's own ops."""
        return find_native_library() if self.may_use_native else None

    @property
    def may_use_native(self) -> bool:
        """Whether lorac-native's op is used if it is installed."""
        return bool(self.native) and self.chosen == (CPU,)
