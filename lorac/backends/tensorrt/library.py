"""NVIDIA's libraries that build and run plans, the dtypes that they share with torch, and their error messages.

``tensorrt`` (10 and 11) serves where it is installed and there is a GPU. Everywhere else ``tensorrt_rtx`` does, which
has the same interface and builds without one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from lorac.errors import MissingExtra, Unavailable, short, warn

if TYPE_CHECKING:
    import tensorrt

_NVIDIA, _RTX = "tensorrt", "tensorrt_rtx"
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


# ── The library ──────────────────────────────────────────────────────────────────────────────────────────────────────
@functools.cache
def trt() -> Any:
    """Return the library, imported on first use.

    Raises:
        MissingExtra: neither can be imported.
    """
    failed: ImportError | OSError | None = None
    for name in (_NVIDIA, _RTX) if torch.cuda.is_available() else (_RTX, _NVIDIA):
        try:
            return importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: the package is there, and its shared library is not
            failed = error
    raise MissingExtra(_RTX, "tensorrt") from failed


def version() -> str:
    """Return the library's version."""
    return str(trt().__version__)


def name_and_version() -> str:
    """Return the library's name and version: a plan runs in the one that made it."""
    return f"{trt().__name__} {version()}"


def is_rtx() -> bool:
    """Return whether it is TensorRT for RTX, which builds without a GPU and compiles kernels where a plan is loaded."""
    return str(trt().__name__) == _RTX


# ── Dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def torch_dtype(dtype: tensorrt.DataType) -> torch.dtype:
    """Return torch's dtype for one of TensorRT's.

    Raises:
        Unavailable: torch has none, as for numbers of 4 bits.
    """
    found = _DTYPES.get(dtype.name)
    if found is None:
        raise Unavailable(
            f"torch has no tensors of TensorRT's {dtype.name}",
            next_step=f"it has {', '.join(map(str, _DTYPES.values()))}",
        )
    return found


def trt_dtype(dtype: torch.dtype) -> tensorrt.DataType:
    """Return TensorRT's dtype for one of torch's.

    Raises:
        Unavailable: TensorRT does not compute in it.
    """
    for name, known in _DTYPES.items():
        if known == dtype:
            return trt().DataType.__members__[name]
    raise Unavailable(
        f"TensorRT has no tensors of {dtype}", next_step=f"it has {', '.join(map(str, _DTYPES.values()))}"
    )


# ── Messages ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(eq=False)
class BuildMessages:
    """The errors that TensorRT reports while a block of ``collect_errors`` runs.

    Attributes:
        errors: the messages.
        read: whether an error of lorac's quotes them.
    """

    errors: list[str] = field(default_factory=list)
    read: bool = False

    def why(self) -> str:
        """Return the first message, of which later ones are mostly consequences, for the text of an error."""
        self.read = True
        return short(self.errors[0]) if self.errors else "TensorRT gives no reason"


class _ThreadListeners(threading.local):
    """The blocks of a thread, the innermost last."""

    def __init__(self) -> None:
        self.blocks: list[BuildMessages] = []


_LISTENERS = _ThreadListeners()
_ALL_LISTENERS: set[BuildMessages] = set()
"""The blocks of all threads, to which TensorRT's own threads report."""
_LOG = logging.getLogger("lorac.tensorrt")


@contextlib.contextmanager
def collect_errors() -> Iterator[BuildMessages]:
    """Collect the errors that TensorRT reports inside the block.

    Code that finds that a call failed raises an error with ``BuildMessages.why``. Errors that are unread when the block
    ends normally become a ``LoracWarning``.
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


@functools.cache
def logger() -> tensorrt.ILogger:
    """Return the logger of all of TensorRT's objects: it prints nothing, and reports errors to ``collect_errors``.

    TensorRT keeps the first logger of a process for good.
    """
    base = trt().ILogger
    failures = (base.INTERNAL_ERROR, base.ERROR)

    class Listener(base):  # type: ignore[misc, valid-type]  # the base is known once the library is
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: tensorrt.ILogger.Severity, text: str) -> None:
            if severity in failures:
                _record_error(text)

    return Listener()


def _record_error(text: str) -> None:
    """Report an error to this thread's innermost block, or else to every block; never raise inside TensorRT."""
    _LOG.debug("%s", text)
    for messages in _LISTENERS.blocks[-1:] or tuple(_ALL_LISTENERS):
        messages.errors.append(text)
