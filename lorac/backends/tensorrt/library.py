"""Which of NVIDIA's libraries builds and runs plans: ``tensorrt`` where it is installed, else ``tensorrt_rtx``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import Any

_NVIDIA, _RTX = "tensorrt", "tensorrt_rtx"


@functools.cache
def trt() -> Any:
    """The library, imported when it is first asked for.

    Raises:
        ModuleNotFoundError: neither is installed.
    """
    return importlib.import_module(_NVIDIA if importlib.util.find_spec(_NVIDIA) is not None else _RTX)


def version() -> str:
    """The library's version."""
    return str(trt().__version__)


def is_rtx() -> bool:
    """Whether it is TensorRT for RTX, which builds without a GPU and compiles kernels where a plan is loaded."""
    return str(trt().__name__) == _RTX
