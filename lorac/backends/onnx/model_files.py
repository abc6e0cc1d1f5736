"""Emitted programs on disk: each graph's model with its weights beside it; how they are called, and read back.

The files are held once they are written or checked (``lorac.storage.open_file``): a library is handed what they hold,
never
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
from lorac.frontend.components import MAIN_GRAPH
from lorac.storage.open_file import OpenFile

Array = npt.NDArray[Any]
MODEL_FILE, WEIGHTS_FILE, BASE_FILE = "model.onnx", "model.onnx.data", "base.safetensors"
MAX_LENGTH_KEY = "lorac.longest"
"""Under what a model says, of a program that keeps a cache, the longest text that its positions admit."""
_NATURAL_NUMBER = re.compile(r"[0-9]{1,18}")
_TENSORLESS_MESSAGES = frozenset({"onnx.ValueInfoProto", "onnx.StringStringEntryProto", "onnx.OperatorSetIdProto"})
"""Messages that are many and hold no tensor."""


def graph_folder(folder: Path, graph: str) -> Path:
    """The folder of a graph."""
    return folder if graph == MAIN_GRAPH else folder / "graphs" / graph


def graph_file(graph: str, leaf: str) -> str:
    """The name of a graph's file, from the program's folder on, with slashes."""
    return (graph_folder(Path(), graph) / leaf).as_posix()


def list_program_files(graphs: Iterable[str]) -> list[str]:
    """Names of all the files that a program may have: not every one has large weights, or needs its base's."""
    return [BASE_FILE, *(graph_file(graph, leaf) for graph in graphs for leaf in (MODEL_FILE, WEIGHTS_FILE))]


def read_model_files(files: Mapping[str, OpenFile], graph: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model, and by name the weights that lie beside it, mapped where they lie; not one is copied.

    Weights of nested graphs are in the model itself then: none can be handed over from outside.

    Raises:
        ArtifactError: as ``check_locations``; or a constant of a node lies in a file.
    """
    model = _load_checked(files, graph)
    held = files.get(graph_file(graph, WEIGHTS_FILE))
    data = memoryview(held.mapped() if held is not None and held.size else b"")
    where = files[graph_file(graph, MODEL_FILE)].where
    weights = {
        tensor.name: _read_weight(tensor, data, where) for tensor in filter(_is_external, model.graph.initializer)
    }
    for inner in walk_subgraphs(model.graph):
        for tensor in filter(_is_external, inner.initializer):
            tensor.raw_data = _read_weight(tensor, data, where).tobytes()
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
    _check_node_tensors(model, where)
    return model, weights


def _check_node_tensors(model: onnx.ModelProto, where: Path) -> None:
    """Files are read for initializers alone: what a node's attribute says of one is nobody's to open."""
    parts = (model.graph.node, model.graph.sparse_initializer, model.functions, model.training_info)
    tensors = (tensor for part in parts for message in part for tensor in _walk_tensors(message))
    for tensor in filter(_is_external, tensors):
        raise ArtifactError(
            f"'{where}' keeps a constant of a node in the file '{_external_data(tensor).get('location')}'",
            next_step="do not use this artefact: lorac does not write such models",
        )


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data)


def _external_data(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _read_weight(tensor: onnx.TensorProto, data: memoryview, model: Path) -> Array:
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    try:
        values: Array = np.frombuffer(
            data, dtype, math.prod(tensor.dims), int(_external_data(tensor).get("offset", "0"))
        )
    except ValueError as error:
        raise ArtifactError(f"'{model}' keeps the weight '{tensor.name}' where its file has none") from error
    return values.reshape(tuple(tensor.dims))


def walk_subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a graph's nodes, however deep."""
    attributes = (attribute for node in graph.node for attribute in node.attribute)
    for inner in (graph for a in attributes for graph in (*((a.g,) if a.HasField("g") else ()), *a.graphs)):
        yield inner
        yield from walk_subgraphs(inner)


def check_locations(files: Mapping[str, OpenFile], graph: str) -> None:
    """A model names the files its tensors lie in: none but the one beside it is read, and no byte beyond its end.

    Tensors are looked for wherever ONNX allows them: initializers, dense or sparse, of the graph and of graphs in
    nodes, constants and other attributes, functions.

    Args:
        files: the program, held.
        graph: which of its graphs.

    Raises:
        ArtifactError: it is no model, or names another file or another place in it.
    """
    _load_checked(files, graph)


def _load_checked(files: Mapping[str, OpenFile], graph: str) -> onnx.ModelProto:
    held, beside = files[graph_file(graph, MODEL_FILE)], files.get(graph_file(graph, WEIGHTS_FILE))
    path, size = held.where, 0 if beside is None else beside.size
    try:
        model = onnx.load_from_string(held.read())
    except DecodeError as error:
        raise ArtifactError(f"'{path}' is no ONNX model: {error}", next_step="copy the whole folder again") from error
    for tensor in _walk_tensors(model):
        if _is_external(tensor):
            _check_location(path, tensor, size)
    return model


def _check_location(path: Path, tensor: onnx.TensorProto, size: int) -> None:
    given = [(entry.key, entry.value) for entry in tensor.external_data]
    told = dict(given)
    if told.get("location") != WEIGHTS_FILE or len(told) < len(given):
        raise ArtifactError(
            f"'{path}' keeps the weight '{tensor.name}' in '{told.get('location')}', not in '{WEIGHTS_FILE}'",
            next_step="do not use this artefact: lorac does not write such models",
        )
    numbers = {key: told.get(key, "0") for key in ("offset", "length")}
    whole = all(_NATURAL_NUMBER.fullmatch(number) for number in numbers.values())
    if not whole or sum(map(int, numbers.values())) > size:
        raise ArtifactError(
            f"'{path}' says that the weight '{tensor.name}' has {short(numbers['length'])} bytes from "
            f"{short(numbers['offset'])} on in '{WEIGHTS_FILE}', which has {size}",
            next_step="copy the whole folder again",
        )


def _walk_tensors(message: Any) -> Iterator[onnx.TensorProto]:
    """Every tensor in a message, however deep: whatever field it lies in."""
    waiting = [message]
    while waiting:
        here = waiting.pop()
        if isinstance(here, onnx.TensorProto):
            yield here
            continue
        waiting.extend(_child_messages(here))


def _child_messages(message: Message) -> Iterator[Message]:
    """The messages in a message's own fields that may hold tensors."""
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.full_name not in _TENSORLESS_MESSAGES:
            yield from [value] if isinstance(value, Message) else value
