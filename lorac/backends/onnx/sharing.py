"""Base weights that emitted models hold anyway: they are found there, so that no file holds them a second time."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from lorac.backends.onnx.files import WEIGHTS, Array, name_of, read
from lorac.ir.engine import Files
from lorac.ir.store.tensors import Place, raw_bytes

Tensor = torch.Tensor
_MATRIX = 2
_BEGIN = 64
"""Bytes by which candidates are told apart before all their bytes are compared."""


def places_of(
    files: Files, graphs: Iterable[str], tensors: Mapping[str, Tensor], joined: Collection[tuple[int, ...]] = ()
) -> dict[str, Place]:
    """Where emitted models hold these tensors, as they are or transposed; those that none holds are left out.

    Args:
        files: the program, held.
        graphs: its graphs.
        tensors: by name.
        joined: how many outputs each of several layers has, whose weights a model may hold as one, side by side.
    """
    held = _held(files, graphs, joined)
    found = {}
    for name, tensor in tensors.items():
        places = (_place(held, tensor, by_columns) for by_columns in ((False, True) if tensor.dim() == 2 else (False,)))
        place = next((place for place in places if place is not None), None)
        if place is not None:
            found[name] = place
    return found


@dataclass(frozen=True)
class _There:
    """A weight in a file: where it is, and its bytes, as a matrix a row of them per row."""

    file: str
    offset: int
    row: int
    values: Array


_Held = Mapping[tuple[int, bytes], list[_There]]
"""Size and first bytes -> the weights that are like that."""


def _held(files: Files, graphs: Iterable[str], joined: Collection[tuple[int, ...]]) -> _Held:
    held: dict[tuple[int, bytes], list[_There]] = defaultdict(list)
    for there in (there for graph in graphs for there in _weights(files, graph, joined)):
        held[there.values.size, _first(there.values)].append(there)
    return held


def _first(values: Array) -> bytes:
    """The first of some bytes; those of a part of a matrix do not lie side by side, and are not all copied for that."""
    return bytes(values[: 1 if values.ndim > 1 else _BEGIN].reshape(-1)[:_BEGIN].tobytes())


def _weights(files: Files, graph: str, joined: Collection[tuple[int, ...]]) -> Iterator[_There]:
    """The weights beside a graph's model, and those that they may be made of."""
    model, weights = read(files, graph)
    for tensor in (tensor for tensor in model.graph.initializer if tensor.name in weights):
        offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
        yield from _parts(name_of(graph, WEIGHTS), offset, weights[tensor.name], joined)


def _parts(file: str, offset: int, weight: Array, joined: Collection[tuple[int, ...]]) -> Iterator[_There]:
    """A weight, and the weights that it may be made of."""
    yield _There(file, offset, 0, weight.reshape(-1).view("u1"))
    for sizes in joined:
        if weight.ndim not in (1, _MATRIX) or weight.shape[-1] != sum(sizes):
            continue
        row = weight.reshape(-1, sum(sizes)).view("u1")
        ends = [size * weight.itemsize for size in itertools.accumulate(sizes)]
        for begin, end in itertools.pairwise((0, *ends)):
            yield _There(file, offset + begin, row.shape[1] if len(row) > 1 else 0, row[:, begin:end])


def _place(held: _Held, tensor: Tensor, by_columns: bool) -> Place | None:
    laid_out = tensor.t() if by_columns else tensor
    begin = bytes(raw_bytes(laid_out[:1].flatten()[:_BEGIN]))[:_BEGIN] if tensor.dim() else b""
    candidates = held.get((tensor.nbytes, begin), ())
    if not candidates:
        return None
    values = np.asarray(raw_bytes(laid_out))
    same = (there for there in candidates if np.array_equal(there.values, values.reshape(there.values.shape)))
    return next((Place(there.file, there.offset, by_columns, there.row) for there in same), None)
