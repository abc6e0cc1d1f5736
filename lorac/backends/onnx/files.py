"""Emitted programs on disk: each graph's model with its weights beside it.

Weights go beside the model as external data, so that models over 2 GB work, and they are mapped instead of read. The
files are held once they are written or checked (``lorac.ir.store.held``): a library is handed what they hold, never
their paths, by which it might meet others. The only graph of a single model lies in the folder itself, the graphs of
several in a folder each.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from google.protobuf.message import DecodeError, Message

from lorac.errors import ArtifactError, short
from lorac.ir.host.components import MAIN
from lorac.ir.store.held import HeldFile

Array = npt.NDArray[Any]
MODEL, WEIGHTS, BASE = "model.onnx", "model.onnx.data", "base.safetensors"
_BESIDE = 1024
"""Bytes from which a weight lies beside the model."""
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
    """Names of all the files that a program may have; a model without large weights has none beside it."""
    return [BASE, *(name_of(graph, leaf) for graph in graphs for leaf in (MODEL, WEIGHTS))]


def write(model: ir.Model, folder: Path) -> None:
    """Write a model and its weights into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    ir.save(model, folder / MODEL, external_data=WEIGHTS, size_threshold_bytes=_BESIDE)


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


def read(files: Mapping[str, HeldFile], graph: str) -> tuple[ir.Model, dict[str, Array]]:
    """A model, and by name the weights that lie beside it, mapped where they lie; not one is copied.

    Weights of nested graphs are in the model itself then: none can be handed over from outside.

    Raises:
        ArtifactError: a weight is not where the model says it is, or a constant of a node lies in a file.
    """
    with files[name_of(graph, MODEL)].named() as path:
        model = ir.load(path)
    held = files.get(name_of(graph, WEIGHTS))
    data = memoryview(held.mapped() if held is not None and held.size else b"")
    where = files[name_of(graph, MODEL)].where
    _refuse_other_files(model, where)
    for nested in model.graphs():
        for value in _beside(nested) if nested is not model.graph else ():
            value.const_value = ir.tensor(_weight(value, data, where), name=value.name)
    return model, {str(value.name): _weight(value, data, where) for value in _beside(model.graph)}


def _refuse_other_files(model: ir.Model, where: Path) -> None:
    """Files are read for initializers alone: what a node's attribute says of one is nobody's to open."""
    nodes = [*model.graph.all_nodes(), *(node for made in model.functions.values() for node in made.all_nodes())]
    given = [attribute.value for node in nodes for attribute in node.attributes.values() if not attribute.is_ref()]
    for value in (item for one in given for item in (one if isinstance(one, list | tuple) else (one,))):
        if isinstance(value, ir.ExternalTensor):
            raise ArtifactError(
                f"'{where}' keeps a constant of a node in the file '{value.location}'",
                next_step="do not use this artefact: lorac does not write such models",
            )


def _beside(graph: ir.Graph) -> list[ir.Value]:
    return [value for value in graph.initializers.values() if isinstance(value.const_value, ir.ExternalTensor)]


def _weight(value: ir.Value, data: memoryview, model: Path) -> Array:
    tensor: Any = value.const_value
    try:
        values: Array = np.frombuffer(data, tensor.dtype.numpy(), int(tensor.size), tensor.offset or 0)
    except ValueError as error:
        raise ArtifactError(f"'{model}' keeps the weight '{value.name}' where its file has none") from error
    return values.reshape(tuple(tensor.shape.numpy()))


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
    held, beside = files[name_of(graph, MODEL)], files.get(name_of(graph, WEIGHTS))
    path, size = held.where, 0 if beside is None else beside.size
    try:
        model = onnx.load_from_string(held.read())
    except DecodeError as error:
        raise ArtifactError(f"'{path}' is no ONNX model: {error}", next_step="copy the whole folder again") from error
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
        waiting.extend(_inside(here))


def _inside(message: Message) -> Iterator[Message]:
    """The messages in a message's own fields that may hold tensors."""
    for field, value in message.ListFields():
        if field.message_type is not None and field.message_type.full_name not in _WITHOUT:
            yield from [value] if isinstance(value, Message) else value
