"""Locations of base weights in emitted models, so that no other file stores them again."""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from lorac.backends.onnx.model_files import WEIGHTS_FILE, Array, graph_file, read_model_files, read_offset
from lorac.storage.tensor_file import TensorLocation, raw_bytes
from lorac.target.engine import ProgramFiles

_MATRIX = 2
_PREFIX_BYTES = 64
"""Number of first bytes by which candidates are found before all their bytes are compared."""


def locate_weights(
    files: ProgramFiles, graphs: Iterable[str], tensors: Mapping[str, Tensor], joined: Collection[tuple[int, ...]] = ()
) -> dict[str, TensorLocation]:
    """Return name -> location, for the tensors that emitted models contain, possibly transposed.

    Args:
        joined: the numbers of outputs of layers whose weights a model may concatenate into one matrix.
    """
    index, locations = defaultdict[tuple[int, bytes], list[_WeightLocation]](list), {}
    stored = ((graph, *weight) for graph in graphs for weight in walk_stored_weights(files, graph))
    for name, _, offset, weight in stored:
        for part in _split_weight(graph_file(name, WEIGHTS_FILE), offset, weight, joined):
            first = part.values[: 1 if part.values.ndim > 1 else _PREFIX_BYTES]  # do not copy strided rows
            index[part.values.size, first.reshape(-1)[:_PREFIX_BYTES].tobytes()].append(part)
    for name, tensor in tensors.items():
        layouts = (False, True) if tensor.dim() == _MATRIX else (False,)
        location = next(filter(None, (_find_tensor(index, tensor, by_columns) for by_columns in layouts)), None)
        if location is not None:
            locations[name] = location
    return locations


@dataclass(frozen=True)
class _WeightLocation:
    """A weight in a file, with its bytes: a single row, or one row per row of a matrix."""

    file: str
    offset: int
    row: int
    values: Array


_WeightIndex = Mapping[tuple[int, bytes], list[_WeightLocation]]
"""Size and first bytes -> weights."""


def walk_stored_weights(files: ProgramFiles, graph: str) -> Iterator[tuple[str, int, Array]]:
    """Yield the name, the file offset and the values of each weight in a graph's file of weights."""
    model, weights = read_model_files(files, graph)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            yield tensor.name, read_offset(tensor), weights[tensor.name]


def _split_weight(
    file: str, offset: int, weight: Array, joined: Collection[tuple[int, ...]]
) -> Iterator[_WeightLocation]:
    """Yield a weight, and the weights of which it may be a concatenation."""
    yield _WeightLocation(file, offset, 0, weight.reshape(-1).view("u1"))
    for sizes in joined:
        if weight.ndim not in (1, _MATRIX) or weight.shape[-1] != sum(sizes):
            continue
        row = weight.reshape(-1, sum(sizes)).view("u1")
        ends = [size * weight.itemsize for size in itertools.accumulate(sizes)]
        for begin, end in itertools.pairwise((0, *ends)):
            yield _WeightLocation(file, offset + begin, row.shape[1] if len(row) > 1 else 0, row[:, begin:end])


def _find_tensor(index: _WeightIndex, tensor: Tensor, by_columns: bool) -> TensorLocation | None:
    matrix = tensor.t() if by_columns else tensor
    prefix = bytes(raw_bytes(matrix[:1].flatten()[:_PREFIX_BYTES]))[:_PREFIX_BYTES] if tensor.dim() else b""
    candidates = index.get((tensor.nbytes, prefix), ())
    if not candidates:
        return None
    values = np.asarray(raw_bytes(matrix))
    # A strided part must have the matrix's rows, since zeros have equal bytes in any shape.
    rows = (weight for weight in candidates if not weight.row or len(weight.values) == len(matrix))
    equal = (weight for weight in rows if np.array_equal(weight.values, values.reshape(weight.values.shape)))
    return next((TensorLocation(weight.file, weight.offset, by_columns, weight.row) for weight in equal), None)
