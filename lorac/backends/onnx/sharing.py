"""Base weights that emitted models hold anyway: they are found there, so that no file holds them a second time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np
import torch

from lorac.backends.onnx.files import WEIGHTS, Array, name_of, read
from lorac.ir.engine import Files
from lorac.ir.store.tensors import Place, raw_bytes

Tensor = torch.Tensor
_BEGIN = 64
"""Bytes by which candidates are told apart before all their bytes are compared."""


def places_of(files: Files, graphs: Iterable[str], tensors: Mapping[str, Tensor]) -> dict[str, Place]:
    """Where emitted models hold these tensors, as they are or transposed; those that none holds are left out.

    Args:
        files: the program, held.
        graphs: its graphs.
        tensors: by name.
    """
    held = _held(files, graphs)
    found = {}
    for name, tensor in tensors.items():
        places = (_place(held, tensor, by_columns) for by_columns in ((False, True) if tensor.dim() == 2 else (False,)))
        place = next((place for place in places if place is not None), None)
        if place is not None:
            found[name] = place
    return found


_Held = Mapping[tuple[int, bytes], list[tuple[str, int, Array]]]
"""Size and first bytes -> file, offset and bytes of each weight that is like that."""


def _held(files: Files, graphs: Iterable[str]) -> _Held:
    held: dict[tuple[int, bytes], list[tuple[str, int, Array]]] = defaultdict(list)
    for graph in graphs:
        model, weights = read(files, graph)
        for tensor in (tensor for tensor in model.graph.initializer if tensor.name in weights):
            offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
            values = weights[tensor.name].reshape(-1).view("u1")
            held[values.size, values[:_BEGIN].tobytes()].append((name_of(graph, WEIGHTS), offset, values))
    return held


def _place(held: _Held, tensor: Tensor, by_columns: bool) -> Place | None:
    laid_out = tensor.t() if by_columns else tensor
    begin = bytes(raw_bytes(laid_out[:1].flatten()[:_BEGIN]))[:_BEGIN] if tensor.dim() else b""
    candidates = held.get((tensor.nbytes, begin), ())
    if not candidates:
        return None
    values = np.asarray(raw_bytes(laid_out))
    same = (Place(file, offset, by_columns) for file, offset, there in candidates if np.array_equal(there, values))
    return next(same, None)
