"""Settling: weights that were bound become constants of a second session, which ONNX Runtime prepacks.

Bound weights are served at once but cannot be prepacked (dearest around 16 tokens a call). A settled session holds a
copy of them and answers faster; its results round differently from the bound session's, so it is its own weight state,
used only when asked for and only while the weights it was made from are the active ones.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnxruntime as ort
import torch

from lorac.backends.onnxruntime.inference_session import create_session
from lorac.backends.onnxruntime.options import OnnxRuntimeOptions
from lorac.target.engine import ProgramFiles


def create_frozen_session(
    files: ProgramFiles, graph: str, tensors: Mapping[str, torch.Tensor], options: OnnxRuntimeOptions
) -> ort.InferenceSession:
    """A session of an emitted program with ``tensors`` as constants.

    Args:
        files: the program, held.
        graph: which of its graphs.
        tensors: slot input -> its value; copied, so that later writes do not reach the session.
        options: the target's.
    """
    return create_session(
        files, graph, options, {name: t.detach().to("cpu", copy=True).numpy() for name, t in tensors.items()}
    )
