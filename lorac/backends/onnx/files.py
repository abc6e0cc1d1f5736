"""Emitted programs on disk: each graph's model with its weights beside it.

Weights go beside the model as external data, so that models over 2 GB work and ONNX Runtime maps them instead of
reading them. The only graph of a single model lies in the folder itself, the graphs of several in a folder each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError, Message

from lorac.errors import ArtifactError, short
from lorac.ir.host.components import MAIN

MODEL, WEIGHTS, BASE = "model.onnx", "model.onnx.data", "base.safetensors"
_BESIDE = 1024
"""Bytes from which a weight lies beside the model."""
_NATURAL = re.compile(r"[0-9]{1,18}")
_WITHOUT = frozenset({"onnx.ValueInfoProto", "onnx.StringStringEntryProto", "onnx.OperatorSetIdProto"})
"""Messages that are many and hold no tensor."""


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
    """A model names the files its tensors lie in: none but the one beside it is read, and no byte beyond its end.

    Tensors are looked for wherever ONNX allows them: initializers, dense or sparse, of the graph and of graphs in
    nodes, constants and other attributes, functions.

    Raises:
        ArtifactError: it is no model, or names another file or another place in it.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise ArtifactError(f"'{path}' is no ONNX model: {error}", next_step="copy the whole folder again") from error
    beside = path.parent / WEIGHTS
    size = beside.stat().st_size if beside.is_file() else 0
    for tensor in _tensors(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            _check_location(path, tensor, size)


def _check_location(path: Path, tensor: onnx.TensorProto, size: int) -> None:
    given = [(entry.key, entry.value) for entry in tensor.external_data]
    told = dict(given)
    if told.get("location") != WEIGHTS or len(told) < len(given):
        raise ArtifactError(
            f"'{path}' keeps the weight '{tensor.name}' in '{told.get('location')}', not in '{WEIGHTS}'",
            next_step="do not use this artefact: lorac does not write such models",
        )
    numbers = {key: told.get(key, "0") for key in ("offset", "length")}
    whole = all(_NATURAL.fullmatch(number) for number in numbers.values())
    if not whole or sum(map(int, numbers.values())) > size:
        raise ArtifactError(
            f"'{path}' says that the weight '{tensor.name}' has {short(numbers['length'])} bytes from "
            f"{short(numbers['offset'])} on in '{WEIGHTS}', which has {size}",
            next_step="copy the whole folder again",
        )


def _tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor in a message, however deep: whatever field it lies in."""
    waiting = [message]
    while waiting:
        here = waiting.pop()
        if isinstance(here, onnx.TensorProto):
            yield here
            continue
        for field, value in here.ListFields():
            if field.message_type is not None and field.message_type.full_name not in _WITHOUT:
                waiting.extend([value] if isinstance(value, Message) else value)
