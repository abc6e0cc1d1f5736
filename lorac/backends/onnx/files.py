"""Emitted programs on disk: each graph's model with its weights beside it.

Weights go beside the model as external data, so that models over 2 GB work and ONNX Runtime maps them instead of
reading them. The only graph of a single model lies in the folder itself, the graphs of several in a folder each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir
import torch

from lorac.errors import ArtifactError
from lorac.ir.host.components import MAIN

MODEL, WEIGHTS, BASE = "model.onnx", "model.onnx.data", "base.safetensors"
_BESIDE = 1024
"""Bytes from which a weight lies beside the model."""


def home_of(folder: Path, graph: str) -> Path:
    """The folder of a graph."""
    return folder if graph == MAIN else folder / "graphs" / graph


def write(model: ir.Model, folder: Path) -> Path:
    """Write a model and its weights into a folder; returns the model's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / MODEL
    ir.save(model, path, external_data=WEIGHTS, size_threshold_bytes=_BESIDE)
    return path


def bake(model: ir.Model, constants: Mapping[str, torch.Tensor]) -> None:
    """Turn slot inputs into initializers, in place.

    Args:
        model: as emitted.
        constants: slot name -> value.
    """
    for value in list(model.graph.inputs):
        tensor = constants.get(value.name or "")
        if tensor is None:
            continue
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(tensor.detach().contiguous().numpy(), name=value.name)
        model.graph.initializers[str(value.name)] = value


def written_files(folder: Path, graphs: Iterable[str]) -> list[Path]:
    """The files of a program, relative to its folder; a model without large weights has none beside it."""
    homes = [home_of(folder, graph) for graph in graphs]
    wanted = [folder / BASE, *(home / name for home in homes for name in (MODEL, WEIGHTS))]
    return [path.relative_to(folder) for path in wanted if path.exists()]


def check_locations(path: Path) -> None:
    """The model names the files its weights lie in: none but the one beside it is read.

    Raises:
        ArtifactError: it names another.
    """
    for value in ir.load(path).graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != WEIGHTS:
            raise ArtifactError(f"'{path}' keeps the weight '{value.name}' in '{tensor.location}', not in '{WEIGHTS}'")
