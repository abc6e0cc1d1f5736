"""Options of the openvino target."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from lorac.backends.onnx.quantised.options import QuantisationOptions, check_threads
from lorac.errors import OptionError, Unavailable, not_one_of, short

if TYPE_CHECKING:
    import openvino

PRECISIONS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
"""OpenVINO's name of a dtype that products are computed in -> torch's."""
_CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
"""Precision -> its name among the capabilities of a device."""
MAX_STREAMS = 256
"""More calls at once than a machine has cores for; each has memory of its own."""
CPU = "CPU"


@functools.cache
def get_core() -> "openvino.Core":
    """Return the core of this process.

    It is never freed: where a processor has AMX, OpenVINO 2026.4 has the thread handle signals on a stack of the core,
    which it unmaps with the core, so that the next signal would end the process.
    """
    import openvino

    return openvino.Core()


@dataclass(frozen=True, kw_only=True)
class OpenVINOOptions(QuantisationOptions):
    """Options of the openvino target.

    Attributes:
        threads: threads of the CPU, 0 for OpenVINO's own choice.
        precision: of products: ``"f32"``, ``"bf16"`` or ``"f16"``; slots and merged weights are held
            in it, and inputs and outputs stay as they are. OpenVINO's own default is bf16 where the processor has it,
            which lorac never leaves to it.
        streams: how many calls may be computed at once; further ones wait for their turn. Each stream has its share of
            the threads.
        device_name: OpenVINO's name of a device, ``"CPU"``, ``"GPU"`` or ``"GPU.1"``.
        cache: keep keys and values, as ``generate`` needs it, of a causal language model of transformers; calls are
            then as target ``"onnxruntime"`` takes them.
    """

    running: ClassVar[tuple[str, ...]] = ("threads", "precision", "streams", "device_name")
    threads: int = 0
    precision: str = "f32"
    streams: int = 1
    device_name: str = CPU
    cache: bool = False

    def check(self) -> None:
        """Raise ``OptionError`` for unknown values, and ``Unavailable`` if the device lacks the precision."""
        check_threads(self.threads)
        self.check_weights()
        if self.precision not in PRECISIONS:
            raise not_one_of("precision cannot be", self.precision, PRECISIONS)
        if not 1 <= self.streams <= MAX_STREAMS:
            raise OptionError(
                f"streams cannot be {short(self.streams)}", next_step=f"give a number from 1 to {MAX_STREAMS}"
            )
        core = get_core()
        if self.device_name not in core.available_devices:
            raise not_one_of("OpenVINO finds no device", self.device_name, core.available_devices)
        if self.threads and self.device_name != CPU:
            raise OptionError(
                f"threads={self.threads} sets threads of the CPU, and the program runs on {self.device_name}",
                next_step="leave threads= out, or give device_name='CPU'",
            )
        able = core.get_property(self.device_name, "OPTIMIZATION_CAPABILITIES")
        if _CAPABILITIES[self.precision] not in able:
            known = [name for name, capability in _CAPABILITIES.items() if capability in able]
            raise Unavailable(
                f"{core.get_property(self.device_name, 'FULL_DEVICE_NAME')} does not compute in {self.precision}",
                next_step=f"give precision={known[0]!r}; it has {', '.join(known)}",
            )
