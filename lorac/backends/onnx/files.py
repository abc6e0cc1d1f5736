"""Emitted programs on disk: each graph's model with its weights beside it; how they are called, and read back.

The files are held once they are written or checked (``lorac.ir.store.held``): a library is handed what they hold, never
their paths, by which it might meet others. The only graph of a single model lies in the folder itself, the graphs of
several in a folder each. A model is read as the message that its file holds: the library that edits models, which
``writing`` uses, takes longer to import than a session to start.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError, Message

from lorac.errors import ArtifactError, short
from lorac.ir.host.components import MAIN
from lorac.ir.store.held import HeldFile

Array = npt.NDArray[Any]
MODEL, WEIGHTS, BASE = "model.onnx", "model.onnx.data", "base.safetensors"
LONGEST = "lorac.longest"
"""Under what a model says, of a program that keeps a cache, the longest text that its positions admit."""
_NATURAL = re.compile(r"[0-9]{1,18}")
_WITHOUT = frozenset({"onnx.ValueInfoProto", "onnx.StringStringEntryProto", "onnx.OperatorSetIdProto"})
"""Messages that are many and hold no tensor."""


def home_of(folder: Path, graph: str) -> Path:
    """The folder of a graph."""
    return folder if graph == MAIN else folder / "graphs" / graph


def name_of(graph: str, leaf: str) -> str:
    """The name of a graph's file, from the program's folder on, with slashes."""
    return (home_of(Path(), graph) / leaf).as_posix()


def names_of(graphs: Iterable[str]) -> list[str]:
    """Names of all the files that a program may have: not every one has large weights, or needs its base's."""
    return [BASE, *(name_of(graph, leaf) for graph in graphs for leaf in (MODEL, WEIGHTS))]


def read(files: Mapping[str, HeldFile], graph: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model, and by name the weights that lie beside it, mapped where they lie; not one is copied.

    Weights of nested graphs are in the model itself then: none can be handed over from outside.

    Raises:
        ArtifactError: as ``check_locations``; or a constant of a node lies in a file.
    """
    model = _checked(files, graph)
    held = files.get(name_of(graph, WEIGHTS))
    data = memoryview(held.mapped() if held is not None and held.size else b"")
    where = files[name_of(graph, MODEL)].where
    weights = {tensor.name: _weight(tensor, data, where) for tensor in filter(_is_beside, model.graph.initializer)}
    for inner in nested(model.graph):
        for tensor in filter(_is_beside, inner.initializer):
            tensor.raw_data = _weight(tensor, data, where).tobytes()
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
    _refuse_other_files(model, where)
    return model, weights


def _refuse_other_files(model: onnx.ModelProto, where: Path) -> None:
    """Files are read for initializers alone: what a node's attribute says of one is nobody's to open."""
    parts = (model.graph.node, model.graph.sparse_initializer, model.functions, model.training_info)
    tensors = (tensor for part in parts for message in part for tensor in _tensors(message))
    for tensor in filter(_is_beside, tensors):
        raise ArtifactError(
            f"'{where}' keeps a constant of a node in the file '{_told(tensor).get('location')}'",
            next_step="do not use this artefact: lorac does not write such models",
        )


def _is_beside(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data)


def _told(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _weight(tensor: onnx.TensorProto, data: memoryview, model: Path) -> Array:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    try:
        values: Array = np.frombuffer(data, dtype, math.prod(tensor.dims), int(_told(tensor).get("offset", "0")))
    except ValueError as error:
        raise ArtifactError(f"'{model}' keeps the weight '{tensor.name}' where its file has none") from error
    return values.reshape(tuple(tensor.dims))


def nested(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a graph's nodes, however deep."""
    attributes = (attribute for node in graph.node for attribute in node.attribute)
    for inner in (graph for a in attributes for graph in (*((a.g,) if a.HasField("g") else ()), *a.graphs)):
        yield inner
        yield from nested(inner)


def check_locations(files: Mapping[str, HeldFile], graph: str) -> None:
    """A model names the files its tensors lie in: none but the one beside it is read, and no byte beyond its end.

    Tensors are looked for wherever ONNX allows them: initializers, dense or sparse, of the graph and of graphs in
    nodes, constants and other attributes, functions.

    Args:
        files: the program, held.
        graph: which of its graphs.

    Raises:
        ArtifactError: it is no model, or names another file or another place in it.
    """
    _checked(files, graph)


def _checked(files: Mapping[str, HeldFile], graph: str) -> onnx.ModelProto:
    held, beside = files[name_of(graph, MODEL)], files.get(name_of(graph, WEIGHTS))
    path, size = held.where, 0 if beside is None else beside.size
    try:
        model = onnx.load_from_string(held.read())
    except DecodeError as error:
        raise ArtifactError(f"'{path}' is no ONNX model: {error}", next_step="copy the whole folder again") from error
    for tensor in _tensors(model):
        if _is_beside(tensor):
            _check_location(path, tensor, size)
    return model


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
        waiting.extend(_inside(here))


def _inside(message: Message) -> Iterator[Message]:
    """The messages in a message's own fields that may hold tensors."""
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.full_name not in _WITHOUT:
            yield from [value] if isinstance(value, Message) else value
