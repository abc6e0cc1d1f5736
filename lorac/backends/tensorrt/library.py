"""NVIDIA's libraries that build and run plans: their dtypes, compute capabilities and error messages.

lorac uses ``tensorrt`` (10 and 11) if it is installed and there is a GPU. Otherwise it uses ``tensorrt_rtx``, which has
the same interface and builds without a GPU. A machine may have both, and a plan runs in the library that built it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from lorac.errors import MissingExtra, OptionError, Unavailable, not_one_of, short, warn

if TYPE_CHECKING:
    import tensorrt

NVIDIA, RTX = "tensorrt", "tensorrt_rtx"
_MARK = "SM"
"""Beginning of the library's names of compute capabilities."""
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
"""TensorRT's name -> torch's dtype, for those that both have."""


class TensorRTLibrary:
    """One of the two libraries.

    Args:
        module: the imported library.
    """

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    @property
    def name(self) -> str:
        """The name of the library's package."""
        return self.module.__name__

    @property
    def name_and_version(self) -> str:
        """The library's name and version, since a plan runs only in the version that built it."""
        return f"{self.name} {self.module.__version__}"

    @property
    def is_rtx(self) -> bool:
        """Whether this is TensorRT for RTX, which builds without a GPU and compiles kernels when a plan is loaded."""
        return self.name == RTX

    @functools.cached_property
    def logger(self) -> tensorrt.ILogger:
        """The logger of all the library's objects, which prints nothing and reports errors to ``collect_errors``.

        TensorRT keeps a process's first logger permanently.
        """
        module = self.module
        base = module.ILogger
        failures = (base.INTERNAL_ERROR, base.ERROR)

        class Listener(base):  # type: ignore[misc, valid-type]  # the base is known once the library is
            def __init__(self) -> None:
                base.__init__(self)

            def log(self, severity: tensorrt.ILogger.Severity, text: str) -> None:
                if severity in failures:
                    _LOG.debug("%s", text)
                    for messages in _LISTENERS.blocks[-1:] or tuple(_ALL_LISTENERS):
                        messages.errors.append(text)

        return Listener()

    def dtype(self, dtype: torch.dtype) -> tensorrt.DataType:
        """Return the library's dtype for one of torch's.

        Raises:
            Unavailable: the library does not support the dtype.
        """
        for name, known in _DTYPES.items():
            if known == dtype:
                return self.module.DataType.__members__[name]
        raise Unavailable(
            f"TensorRT has no tensors of {dtype}", next_step=f"use one of {', '.join(map(str, _DTYPES.values()))}"
        )


def find_library(name: str | None = None) -> TensorRTLibrary:
    """Return a library; import it on first use.

    Args:
        name: ``NVIDIA`` or ``RTX``; None: the first installed one, ``NVIDIA`` before ``RTX`` if there is a GPU.

    Raises:
        MissingExtra: the library cannot be imported.
    """
    failed: ImportError | OSError | None = None
    names = (name,) if name else (NVIDIA, RTX) if torch.cuda.is_available() else (RTX, NVIDIA)
    for each in names:
        try:
            return _import_library(each)
        except (ImportError, OSError) as error:  # OSError: the package exists, but not its shared library
            failed = error
    raise MissingExtra(name or RTX) from failed


@functools.cache
def _import_library(name: str) -> TensorRTLibrary:
    assert name in (NVIDIA, RTX)
    return TensorRTLibrary(importlib.import_module(name))


def torch_dtype(dtype: tensorrt.DataType) -> torch.dtype:
    """Return torch's dtype for one of TensorRT's.

    Raises:
        Unavailable: torch lacks the dtype, as for numbers of 4 bits.
    """
    found = _DTYPES.get(dtype.name)
    if found is None:
        raise Unavailable(
            f"torch has no dtype for TensorRT's {dtype.name}",
            next_step=f"use one of {', '.join(map(str, _DTYPES.values()))}",
        )
    return found


def local_capability() -> str | None:
    """Return the compute capability of torch's current GPU, such as ``"8.9"``; None if torch has no GPU."""
    return capability_of(torch.device("cuda")) if torch.cuda.is_available() else None


def capability_of(device: torch.device) -> str:
    """Return the compute capability of a GPU, such as ``"8.9"``."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}.{minor}"


def known_capabilities(library: TensorRTLibrary) -> tuple[str, ...]:
    """List the capabilities for which a library builds; empty if it builds only for a GPU of this machine."""
    if not library.is_rtx:
        return ()
    numbers = (name.removeprefix(_MARK) for name in library.module.ComputeCapability.__members__)
    return tuple(f"{number[:-1]}.{number[-1]}" for number in numbers if number.isdecimal())


def check_capabilities(wanted: Sequence[str], library: TensorRTLibrary) -> None:
    """Check that a library knows the given capabilities.

    Raises:
        OptionError: a capability is unknown; the error lists the known ones.
    """
    listed = known_capabilities(library)
    strange = [name for name in wanted if name not in listed]
    if not strange:
        return
    if not listed:
        raise OptionError(
            f"{library.name_and_version} takes no target_capabilities: it builds for the GPU that is here",
            next_step=f"leave target_capabilities= out, or give library='{RTX}'",
        )
    raise not_one_of(f"{library.name_and_version} builds for no compute capability", strange[0], listed)


def choose_capabilities(wanted: Sequence[str], library: TensorRTLibrary) -> tuple[str, ...]:
    """Return the requested capabilities, otherwise the current GPU's; empty for the library's default."""
    if wanted:
        return tuple(wanted)
    here = local_capability()
    return (here,) if here is not None and here in known_capabilities(library) else ()


def capability_member(library: TensorRTLibrary, capability: str) -> object:
    """Return the library's enum member for a capability."""
    return library.module.ComputeCapability.__members__[_MARK + capability.replace(".", "")]


@dataclass(eq=False)
class BuildMessages:
    """The errors that TensorRT reports inside a block of ``collect_errors``.

    Attributes:
        errors: the messages.
        read: whether one of lorac's errors quotes them.
    """

    errors: list[str] = field(default_factory=list)
    read: bool = False

    def why(self) -> str:
        """Return the first message for the text of an error; later messages mostly follow from it."""
        self.read = True
        return short(self.errors[0]) if self.errors else "TensorRT gives no reason"


class _ThreadListeners(threading.local):
    """The nested blocks of a thread, the innermost last."""

    def __init__(self) -> None:
        self.blocks: list[BuildMessages] = []


_LISTENERS = _ThreadListeners()
_ALL_LISTENERS: set[BuildMessages] = set()
"""The blocks of all threads, to which TensorRT's own threads report."""
_LOG = logging.getLogger("lorac.tensorrt")


@contextlib.contextmanager
def collect_errors() -> Iterator[BuildMessages]:
    """Collect the errors that TensorRT reports inside the block.

    Code that detects a failed call raises an error with ``BuildMessages.why``. Errors that nobody has read when the
    block ends normally become a ``LoracWarning``.
    """
    messages = BuildMessages()
    _LISTENERS.blocks.append(messages)
    _ALL_LISTENERS.add(messages)
    try:
        yield messages
    finally:
        _LISTENERS.blocks.remove(messages)
        _ALL_LISTENERS.discard(messages)
    if messages.errors and not messages.read:
        warn(f"TensorRT goes on after an error: {messages.why()}")
