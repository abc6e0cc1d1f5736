"""Settling: weights that were bound become constants of a second session, which ONNX Runtime prepacks.

Bound weights are served at once but cannot be prepacked (dearest around 16 tokens a call). A settled session holds a
copy of them and answers faster; its results round differently from the bound session's, so it is its own weight state,
used only when asked for and only while the weights it was made from are the active ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch

from lorac.backends.onnx.files import MODEL


def settled_session(
    folder: Path, tensors: Mapping[str, torch.Tensor], settings: ort.SessionOptions, providers: list[str]
) -> ort.InferenceSession:
    """A session of the emitted program with ``tensors`` as constants.

    Args:
        folder: where the emitted program lies.
        tensors: slot input -> its value; copied, so that later writes do not reach the session.
        settings: session options; the constants are added to them.
        providers: execution providers.
    """
    held = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    values = [ort.OrtValue.ortvalue_from_numpy(tensor.numpy()) for tensor in held.values()]
    settings.add_external_initializers(list(held), values)
    # From memory: the folder may be an artefact, which holds what its manifest lists and nothing else.
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    session = ort.InferenceSession(_with_constants(folder, held), settings, providers=providers)
    # Constants that are not prepacked are read in place.
    session.lorac_constants = held
    return session


def _with_constants(folder: Path, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """The emitted program with its slots as initializers whose data is handed over when a session is made."""
    model = ir.load(folder / MODEL)
    for value in list(model.graph.inputs):
        tensor = tensors.get(str(value.name))
        if tensor is None:
            continue
        model.graph.inputs.remove(value)
        value.const_value = _promised(str(value.name), tensor, folder)
        model.graph.initializers[str(value.name)] = value
    return ir.to_proto(model).SerializeToString()


def _promised(name: str, tensor: torch.Tensor, folder: Path) -> Any:
    """External data in a file that is never read."""
    dtype = ir.tensor(tensor[:0].numpy()).dtype
    shape = ir.Shape(tuple(tensor.shape))
    return ir.ExternalTensor("settled.data", 0, tensor.nbytes, dtype, shape=shape, name=name, base_dir=folder)
