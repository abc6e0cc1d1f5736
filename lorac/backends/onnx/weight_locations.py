"""Base weights that emitted models hold anyway: they are found there, so that no file holds them a second time."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lorac.backends.onnx.model_files import WEIGHTS_FILE, Array, graph_file, read_model_files
from lorac.storage.tensor_file import TensorLocation, raw_bytes
from lorac.target.engine import ProgramFiles

Tensor = torch.Tensor
_MATRIX = 2
_PREFIX_BYTES = 64
"""Bytes by which candidates are told apart before all their bytes are compared."""


def locate_weights(
    files: ProgramFiles, graphs: Iterable[str], tensors: Mapping[str, Tensor], joined: Collection[tuple[int, ...]] = ()
) -> dict[str, TensorLocation]:
    """Where emitted models hold these tensors, as they are or transposed; those that none holds are left out.

    Args:
        files: the program, held.
        graphs: its graphs.
        tensors: by name.
        joined: how many outputs each of several layers has, whose weights a model may hold as one, side by side.
    """
    held = _index_weights(files, graphs, joined)
    found = {}
    for name, tensor in tensors.items():
        places = (
            _find_tensor(held, tensor, by_columns) for by_columns in ((False, True) if tensor.dim() == 2 else (False,))
        )
        place = next((place for place in places if place is not None), None)
        if place is not None:
            found[name] = place
    return found


@dataclass(frozen=True)
class _WeightLocation:
    """A weight in a file: where it is, and its bytes, as a matrix a row of them per row."""

    file: str
    offset: int
    row: int
    values: Array


_WeightIndex = Mapping[tuple[int, bytes], list[_WeightLocation]]
"""Size and first bytes -> the weights that are like that."""


def _index_weights(files: ProgramFiles, graphs: Iterable[str], joined: Collection[tuple[int, ...]]) -> _WeightIndex:
    held: dict[tuple[int, bytes], list[_WeightLocation]] = defaultdict(list)
    for there in (there for graph in graphs for there in _walk_weights(files, graph, joined)):
        held[there.values.size, _first_bytes(there.values)].append(there)
    return held


def _first_bytes(values: Array) -> bytes:
    """The first of some bytes; those of a part of a matrix do not lie side by side, and are not all copied for that."""
    return bytes(values[: 1 if values.ndim > 1 else _PREFIX_BYTES].reshape(-1)[:_PREFIX_BYTES].tobytes())


def _walk_weights(files: ProgramFiles, graph: str, joined: Collection[tuple[int, ...]]) -> Iterator[_WeightLocation]:
    """The weights beside a graph's model, and those that they may be made of."""
    model, weights = read_model_files(files, graph)
    for tensor in (tensor for tensor in model.graph.initializer if tensor.name in weights):
        offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
        yield from _split_weight(graph_file(graph, WEIGHTS_FILE), offset, weights[tensor.name], joined)


def _split_weight(
    file: str, offset: int, weight: Array, joined: Collection[tuple[int, ...]]
) -> Iterator[_WeightLocation]:
    """A weight, and the weights that it may be made of."""
    yield _WeightLocation(file, offset, 0, weight.reshape(-1).view("u1"))
    for sizes in joined:
        if weight.ndim not in (1, _MATRIX) or weight.shape[-1] != sum(sizes):
            continue
        row = weight.reshape(-1, sum(sizes)).view("u1")
        ends = [size * weight.itemsize for size in itertools.accumulate(sizes)]
        for begin, end in itertools.pairwise((0, *ends)):
            yield _WeightLocation(file, offset + begin, row.shape[1] if len(row) > 1 else 0, row[:, begin:end])


def _find_tensor(held: _WeightIndex, tensor: Tensor, by_columns: bool) -> TensorLocation | None:
    laid_out = tensor.t() if by_columns else tensor
    begin = bytes(raw_bytes(laid_out[:1].flatten()[:_PREFIX_BYTES]))[:_PREFIX_BYTES] if tensor.dim() else b""
    candidates = held.get((tensor.nbytes, begin), ())
    if not candidates:
        return None
    values = np.asarray(raw_bytes(laid_out))
    same = (there for there in candidates if np.array_equal(there.values, values.reshape(there.values.shape)))
    return next((TensorLocation(there.file, there.offset, by_columns, there.row) for there in same), None)
