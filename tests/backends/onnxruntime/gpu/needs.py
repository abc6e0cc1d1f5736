"""The requirements of the tests of this folder; a missing one is named in one line."""

from __future__ import annotations

import pytest
import torch

import lorac
from lorac.backends.onnxruntime.devices.providers import CPU, CUDA, check_providers


def _lacking() -> str | None:
    try:
        check_providers((CUDA, CPU), torch.device("cuda"))
    except lorac.Unavailable as error:
        return str(error).partition("\n")[0]
    return None if torch.cuda.is_available() else "torch is built without CUDA"


def marks() -> list[pytest.MarkDecorator]:
    """Return the marks of a module whose tests need a GPU."""
    why = _lacking()
    return [pytest.mark.gpu, pytest.mark.skipif(why is not None, reason=str(why))]
