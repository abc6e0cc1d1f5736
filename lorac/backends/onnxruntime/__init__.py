"""ONNX Runtime: adapters are inputs of one session, bound anew to swap; nothing is ever rebuilt."""

from __future__ import annotations

import onnx_ir  # noqa: F401  (a missing library is reported here, with the extra that brings it)
import onnxruntime  # noqa: F401

from lorac.backends.onnxruntime.artifact import base_file, restore, store
from lorac.backends.onnxruntime.build import build, host_for
from lorac.backends.onnxruntime.options import Options

__all__ = ["Options", "base_file", "build", "host_for", "restore", "store"]
