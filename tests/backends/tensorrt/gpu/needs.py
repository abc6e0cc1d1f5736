"""The requirements of the tests of this folder; a missing one is named in one line."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from lorac.backends.tensorrt.device.requirements import missing_requirement
from lorac.backends.tensorrt.library import capability_of, find_library


def lacking_for_tensorrt() -> str | None:
    """Return why TensorRT does not run here, or None."""
    why = missing_requirement()
    if why is not None:
        return why
    if all(importlib.util.find_spec(name) is None for name in ("tensorrt", "tensorrt_rtx")):
        return "neither tensorrt nor tensorrt_rtx is installed"
    here = capability_of(torch.device("cuda"))
    library = find_library()
    if library.is_rtx and f"SM{here.replace('.', '')}" not in library.module.ComputeCapability.__members__:
        return f"{library.name_and_version} builds for no compute capability {here}, which NVIDIA's tensorrt does"
    return None


def needing(why: str | None) -> list[pytest.MarkDecorator]:
    """Return the marks of a module whose tests have a requirement."""
    return [pytest.mark.gpu, pytest.mark.skipif(why is not None, reason=str(why))]
