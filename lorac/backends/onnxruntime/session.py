"""Sessions, always made with the same settings."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

from lorac.backends.onnxruntime.kernels import no_kernel
from lorac.backends.onnxruntime.options import Options


def session_options(options: Options) -> ort.SessionOptions:
    """ONNX Runtime's settings for the target's options."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = options.threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", "1" if options.spinning else "0")
    settings.log_severity_level = 3
    return settings


def new_session(path: Path, options: Options) -> ort.InferenceSession:
    """A session over an emitted model.

    Raises:
        Unavailable: an op has no kernel in the model's dtype.
    """
    try:
        return ort.InferenceSession(str(path), session_options(options), providers=list(options.providers))
    except NoKernel as error:
        raise no_kernel(path, error) from error
