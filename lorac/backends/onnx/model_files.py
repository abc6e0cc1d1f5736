"""Emitted programs on disk: the files of each graph's model and weights, and functions that read them.

The files stay open once they are written or checked (``lorac.storage.open_file``): a library gets their contents
instead of their paths, which may lead to other files by then. The only graph of a single model is in the program's
folder; each of several graphs has a subfolder. Models are read as protobuf messages, since onnx_ir, which
``initializers`` uses, takes longer to import than a session takes to start.
"""

from __future__ import annotations

import enum
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lorac.errors import ArtifactError, short
from lorac.frontend.components import MAIN_GRAPH
from lorac.storage.open_file import OpenFile

if TYPE_CHECKING:  # targets without ONNX also use the names of files
    import onnx
    from google.protobuf.message import Message

Array = np.ndarray
MODEL_FILE, WEIGHTS_FILE, BASE_FILE = "model.onnx", "model.onnx.data", "base.safetensors"
NEUTRAL_FILE = "neutral.safetensors"
"""Contents of the slots without an active adapter, for programs whose callers must give every slot."""
MAX_LENGTH_KEY = "lorac.longest"
"""Metadata key for the longest sequence that the positions of a program with a cache admit."""
PACKED_KEY = "lorac.packed"
"""Metadata key of a program with a cache whose calls take as long as rows bring tokens, whatever their padding."""
_NATURAL_NUMBER = re.compile(r"[0-9]{1,18}")
_TENSORLESS_MESSAGES = frozenset({"onnx.ValueInfoProto", "onnx.StringStringEntryProto", "onnx.OperatorSetIdProto"})
"""Frequent messages without tensors."""


class SlotStorage(enum.Enum):
    """The place where the content of slots is written.

    Attributes:
        CONSTANTS: in the model, as constants.
        DEFAULTS: in the model, as defaults of optional inputs.
        FILE: in a file beside the model, whose inputs every call must pass.
        NOWHERE: every call must pass it.
    """

    CONSTANTS = enum.auto()
    DEFAULTS = enum.auto()
    FILE = enum.auto()
    NOWHERE = enum.auto()


def graph_folder(folder: Path, graph: str) -> Path:
    """Return the folder of a graph."""
    return folder if graph == MAIN_GRAPH else folder / "graphs" / graph


def graph_file(graph: str, leaf: str) -> str:
    """Return the path of a graph's file relative to the program's folder, with slashes."""
    return (graph_folder(Path(), graph) / leaf).as_posix()


def list_program_files(graphs: Iterable[str]) -> list[str]:
    """Return the paths of all files that a program may have; most programs have only some of them."""
    own = (MODEL_FILE, WEIGHTS_FILE, NEUTRAL_FILE)
    return [BASE_FILE, *(graph_file(graph, leaf) for graph in graphs for leaf in own)]


def read_model_files(files: Mapping[str, OpenFile], graph: str) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """Return a model, and name -> weights in the other file, which are memory-mapped.

    Weights of nested graphs are copied into the model, since no runtime accepts external data there.

    Raises:
        ArtifactError: as ``load_checked_model``; or a node's constant is external data.
    """
    import onnx

    model = load_checked_model(files, graph)
    file = files.get(graph_file(graph, WEIGHTS_FILE))
    data = memoryview(file.mapped() if file is not None and file.size else b"")
    where = files[graph_file(graph, MODEL_FILE)].where
    weights = {
        tensor.name: _read_weight(tensor, data, where) for tensor in filter(_is_external, model.graph.initializer)
    }
    for inner in walk_subgraphs(model.graph):
        for tensor in filter(_is_external, inner.initializer):
            tensor.raw_data = _read_weight(tensor, data, where).tobytes()
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
    parts = (model.graph.node, model.graph.sparse_initializer, model.functions, model.training_info)
    tensors = (tensor for part in parts for message in part for tensor in walk_tensors(message))
    for tensor in filter(_is_external, tensors):
        raise ArtifactError(
            f"'{where}' stores a constant of a node in the file '{_external_data(tensor).get('location')}'",
            next_step="do not use this artifact: lorac does not write such models",
        )
    return model, weights


def _is_external(tensor: onnx.TensorProto) -> bool:
    import onnx

    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data)


def _external_data(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def read_offset(tensor: onnx.TensorProto) -> int:
    """Return the offset of a weight in its file."""
    return int(_external_data(tensor).get("offset", "0"))


def _read_weight(tensor: onnx.TensorProto, data: memoryview, model: Path) -> Array:
    import onnx

    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    try:
        values: Array = np.frombuffer(data, dtype, math.prod(tensor.dims), read_offset(tensor))
    except ValueError as error:
        raise ArtifactError(f"'{model}' stores the weight '{tensor.name}' beyond the end of its file") from error
    return values.reshape(tuple(tensor.dims))


def walk_subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs within a graph's nodes, at all depths."""
    attributes = (attribute for node in graph.node for attribute in node.attribute)
    for inner in (graph for a in attributes for graph in (*((a.g,) if a.HasField("g") else ()), *a.graphs)):
        yield inner
        yield from walk_subgraphs(inner)


def walk_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the nodes of a graph, then the nodes of its subgraphs at all depths."""
    for part in (graph, *walk_subgraphs(graph)):
        yield from part.node


def load_checked_model(files: Mapping[str, OpenFile], graph: str) -> onnx.ModelProto:
    """Return a model, after a check that its external tensors are within its own file of weights.

    The check covers every place where ONNX allows tensors: dense and sparse initializers of the graph and of nested
    graphs, constants and other attributes, and functions.

    Raises:
        ArtifactError: the file is not a model, or refers to another file or beyond the end of its own.
    """
    import onnx
    from google.protobuf.message import DecodeError

    file, weights = files[graph_file(graph, MODEL_FILE)], files.get(graph_file(graph, WEIGHTS_FILE))
    path, size = file.where, 0 if weights is None else weights.size
    try:
        model = onnx.load_from_string(file.read())
    except DecodeError as error:
        raise ArtifactError(
            f"'{path}' is not an ONNX model: {error}", next_step="copy the whole folder again"
        ) from error
    for tensor in filter(_is_external, walk_tensors(model)):
        entries = _external_data(tensor)
        if entries.get("location") != WEIGHTS_FILE or len(entries) < len(tensor.external_data):
            raise ArtifactError(
                f"'{path}' stores the weight '{tensor.name}' in '{entries.get('location')}', not in '{WEIGHTS_FILE}'",
                next_step="do not use this artifact: lorac does not write such models",
            )
        numbers = {key: entries.get(key, "0") for key in ("offset", "length")}
        are_natural = all(_NATURAL_NUMBER.fullmatch(number) for number in numbers.values())
        if not are_natural or sum(map(int, numbers.values())) > size:
            raise ArtifactError(
                f"'{path}' says that the weight '{tensor.name}' has {short(numbers['length'])} bytes from "
                f"{short(numbers['offset'])} on in '{WEIGHTS_FILE}', which has {size}",
                next_step="copy the whole folder again",
            )
    return model


def walk_tensors(message: Message) -> Iterator[onnx.TensorProto]:
    """Yield every tensor in a message, in any field and at any depth."""
    import onnx
    from google.protobuf.message import Message

    pending = [message]
    while pending:
        current = pending.pop()
        if isinstance(current, onnx.TensorProto):
            yield current
            continue
        for field, value in current.ListFields():
            if field.message_type is not None and field.message_type.full_name not in _TENSORLESS_MESSAGES:
                pending.extend([value] if isinstance(value, Message) else value)
