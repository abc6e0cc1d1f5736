"""Which of NVIDIA's libraries builds and runs plans, the dtypes they share with torch, and what they say.

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
from typing import Any

import torch

from lorac.errors import MissingExtra, Unavailable, short, warn

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
"""TensorRT's name -> torch's dtype: those that both have."""


# ── The library ──────────────────────────────────────────────────────────────────────────────────────────────────────
@functools.cache
def trt() -> Any:
    """The library, imported when it is first asked for.

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
    """The library's version."""
    return str(trt().__version__)


def name_and_version() -> str:
    """The library's name and version: what a plan was made by, and can be run by."""
    return f"{trt().__name__} {version()}"


def is_rtx() -> bool:
    """Whether it is TensorRT for RTX, which builds without a GPU and compiles kernels where a plan is loaded."""
    return str(trt().__name__) == _RTX


# ── Dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def torch_dtype(dtype: Any) -> torch.dtype:
    """Torch's dtype for one of TensorRT's.

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


def trt_dtype(dtype: torch.dtype) -> Any:
    """TensorRT's dtype for one of torch's.

    Raises:
        Unavailable: TensorRT does not compute in it.
    """
    for name, known in _DTYPES.items():
        if known == dtype:
            return trt().DataType.__members__[name]
    raise Unavailable(
        f"TensorRT has no tensors of {dtype}", next_step=f"it has {', '.join(map(str, _DTYPES.values()))}"
    )


# ── What it says ─────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(eq=False)
class BuildMessages:
    """The errors that TensorRT tells of while a block of ``listening`` runs."""

    errors: list[str] = field(default_factory=list)
    asked: bool = False

    def why(self) -> str:
        """What it told first, for the message of a typed error: what follows is mostly its consequence."""
        self.asked = True
        return short(self.errors[0]) if self.errors else "TensorRT gives no reason"


class _ThreadListeners(threading.local):
    """The blocks of this thread, the innermost last."""

    def __init__(self) -> None:
        self.blocks: list[BuildMessages] = []


_LISTENERS = _ThreadListeners()
_ALL_LISTENERS: set[BuildMessages] = set()
"""Those of all threads: TensorRT's own threads have none, and tell everyone."""
_LOG = logging.getLogger("lorac.tensorrt")


@contextlib.contextmanager
def collect_errors() -> Iterator[BuildMessages]:
    """Collect the errors that TensorRT tells of inside the block.

    Whoever finds that a call failed raises a typed error with ``BuildMessages.why``. Errors that nobody asked for when
    the block ends in peace become a ``LoracWarning``.
    """
    said = BuildMessages()
    _LISTENERS.blocks.append(said)
    _ALL_LISTENERS.add(said)
    try:
        yield said
    finally:
        _LISTENERS.blocks.remove(said)
        _ALL_LISTENERS.discard(said)
    if said.errors and not said.asked:
        warn(f"TensorRT goes on after an error: {said.why()}")


@functools.cache
def logger() -> Any:
    """The one logger that all of TensorRT's objects get: it prints nothing, and tells errors to ``listening``.

    TensorRT keeps the first logger of a process for good.
    """
    base = trt().ILogger
    failures = (base.INTERNAL_ERROR, base.ERROR)

    class Listener(base):  # type: ignore[misc, valid-type]  # the base is known once the library is
        def __init__(self) -> None:
            base.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            if severity in failures:
                _record_error(text)

    return Listener()


def _record_error(text: str) -> None:
    """Tell the innermost block of this thread, or where it has none every block; it may not raise inside TensorRT."""
    _LOG.debug("%s", text)
    for said in _LISTENERS.blocks[-1:] or tuple(_ALL_LISTENERS):
        said.errors.append(text)
