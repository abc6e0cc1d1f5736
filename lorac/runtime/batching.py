"""Batches that take several calls: the batch is split by rows, each part runs, the outputs are merged.

One call computes rows of several choices of adapters where the program has places for them
(``lorac.ir.slots.places``); this module runs other rows.

Rows are found in any nesting: in mappings, tuples and lists, and in the attributes of objects, such as the caches of
decoders, whose layers have a tensor with one row per sequence. Each call gets a copy of such an object with the call's
rows; afterwards the original is updated as a single call would have updated it.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lorac.errors import ChoiceError, Unavailable
from lorac.ir.calls.call import Call
from lorac.ir.calls.row_selection import Array, RowSelection, has_rows, object_attributes
from lorac.runtime.choice_switch import RowGroup
from lorac.target.engine import AuxOutputs, CallResult


def check_rows(rows: int, choices: Sequence[object]) -> None:
    """Raise ``ChoiceError`` unless there is one choice per row."""
    if rows != len(choices):
        raise ChoiceError(
            f"{len(choices)} choices of adapters for {rows} rows",
            next_step="give one choice per row, or a single choice for all",
        )


def run_rows(run: Callable[[Call, RowGroup], CallResult], call: Call, groups: Sequence[RowGroup]) -> CallResult:
    """Run a batch with one call per group of rows, and merge the outputs in the order of the batch.

    Where a call lacks an extra output that another call has, its rows are filled with NaN, or with 0 for integers.

    Args:
        call: the call of all rows.
        groups: the groups; each row is in one group.

    Raises:
        Unavailable: an output or extra output has no row per input row and differs between the calls.
    """
    if len(groups) == 1:
        return run(call, groups[0])
    total = sum(len(group.rows) for group in groups)
    selections = [RowSelection(group.rows, total) for group in groups]
    calls = [call.select(selection) for selection in selections]  # before any call writes into its inputs
    results = [run(own, group) for own, group in zip(calls, groups, strict=True)]
    merger = _RowMerger(selections)
    merged = CallResult(merger.merge([r.output for r in results]), merger.merge_aux([r.aux for r in results]))
    merger.update_originals()
    return merged


class _RowMerger:
    """A merger of the results of several calls.

    Args:
        selections: the rows of each call, and copies of its inputs.
    """

    def __init__(self, selections: Sequence[RowSelection]) -> None:
        self._selections = selections
        self._rows = [selection.rows for selection in selections]
        self._order = torch.argsort(torch.tensor([row for rows in self._rows for row in rows]))
        self._merged: dict[int, object] = {}
        self._updates: list[tuple[object, dict[str, object]]] = []

    def update_originals(self) -> None:
        """Merge the copies that calls changed back into the input objects; an error leaves all of these unchanged."""
        for copies in zip(*(selection.copies.values() for selection in self._selections), strict=True):
            self._merge_objects([copied for copied, _ in copies])
        for original, attributes in self._updates:
            vars(original).update(attributes)

    def merge(self, parts: Sequence[Any]) -> Any:
        """Merge the values of all calls into one value, rows in the order of the batch."""
        first = parts[0]
        if isinstance(first, Mapping):
            merged = {key: self.merge([part[key] for part in parts]) for key in first}
            return merged if type(first) is dict else type(first)(**merged)
        if isinstance(first, tuple | list):
            return type(first)(self.merge(items) for items in zip(*parts, strict=True))
        if all(has_rows(part) and part.shape[0] == len(rows) for part, rows in zip(parts, self._rows, strict=True)):
            return self._stack(parts)
        if object_attributes(first) is not None:
            return self._merge_objects(parts)
        if all(_values_equal(first, part) for part in parts[1:]):
            return first
        raise Unavailable(
            "an output has no row per input row, so rows cannot choose their own adapters",
            next_step="call once per choice, or leave out the argument for that output, such as labels= for a loss",
        )

    def merge_aux(self, parts: Sequence[AuxOutputs]) -> AuxOutputs:
        """Merge the extra outputs of all calls; rows of calls that lack an output are filled."""
        places = dict.fromkeys((name, path) for part in parts for name, outputs in part.items() for path in outputs)
        merged: dict[str, dict[str, object]] = {}
        for name, path in places:
            found: list[Any] = [part.get(name, {}).get(path) for part in parts]
            some = next(tensor for tensor in found if tensor is not None)
            rows = zip(found, self._rows, strict=True)
            filled = [_make_missing(some, len(own)) if tensor is None else tensor for tensor, own in rows]
            merged.setdefault(name, {})[path] = self.merge(filled)
        return merged

    def _stack(self, parts: Sequence[Array]) -> Array:
        tensors = [part if isinstance(part, torch.Tensor) else torch.from_numpy(part) for part in parts]
        stacked = torch.cat(tensors)[self._order]
        return stacked if isinstance(parts[0], torch.Tensor) else stacked.numpy()

    def _merge_objects(self, parts: Sequence[object]) -> object:
        """Merge objects: into the original where they are copies of an input object, else into a new object."""
        first = parts[0]
        if id(first) in self._merged:
            return self._merged[id(first)]
        _, original = self._selections[0].copies.get(id(first), (None, None))
        merged = self._merged[id(first)] = copy.copy(first) if original is None else original
        attributes = {name: self.merge([vars(part)[name] for part in parts]) for name in vars(first)}
        self._updates.append((merged, attributes))
        return merged


def _make_missing(like: Array, rows: int) -> Array:
    """Return rows of NaN, or of 0 for integers, shaped like the rows of another call."""
    shape = (rows, *like.shape[1:])
    if isinstance(like, torch.Tensor):
        return like.new_full(shape, math.nan if like.is_floating_point() else 0)
    return np.full(shape, math.nan if np.issubdtype(like.dtype, np.floating) else 0, dtype=like.dtype)


def _values_equal(one: object, other: object) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and np.array_equal(one, other)
    return bool(type(one) is type(other) and one == other)
