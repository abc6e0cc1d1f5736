"""The ONNX models of compiled programs, for tests that read their nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir

from lorac.backends.onnx.model_files import MODEL_FILE, read_model_files


def load_emitted(compiled: Any) -> ir.Model:
    """Return the emitted model of a program that was compiled here."""
    return ir.load(compiled.engine.folder / MODEL_FILE)


def load_emitted_proto(compiled: Any) -> onnx.ModelProto:
    """Return the same as a protobuf message, without its weights."""
    return onnx.load(compiled.engine.folder / MODEL_FILE, load_external_data=False)


def read_emitted(compiled: Any) -> tuple[onnx.ModelProto, Mapping[str, Any]]:
    """Return a program's model and its weights, of a loaded artifact too."""
    return read_model_files(compiled.engine.files, "main")
