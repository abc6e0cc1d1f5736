"""Rows of a batch that several calls compute: the batch is split, each part runs by itself, the rows are joined.

One call computes rows of several choices of adapters where the program has places for them
(``lorac.ir.slots.places``); what this module does is left for other rows.

Rows are found in any nesting: in mappings, tuples and lists, and in the attributes of objects, such as the caches of
decoders, whose layers hold a tensor with one row per sequence. Each call gets a copy of such an object with the call's
rows, and the original holds afterwards what a single call would have left in it.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorac.argument_types import Fields
from lorac.errors import ChoiceError, Unavailable
from lorac.ir.calls.call import Call
from lorac.ir.calls.row_selection import Array, RowSelection, has_rows, object_attributes
from lorac.runtime.row_group import RowGroup
from lorac.target.engine import AuxOutputs, CallResult


def check_rows(rows: int, choices: Sequence[object]) -> None:
    """Raise ``ChoiceError`` unless there is one choice per row."""
    if rows != len(choices):
        raise ChoiceError(
            f"{len(choices)} choices of adapters for {rows} rows",
            next_step="give one choice per row, or a single choice for all",
        )


def run_rows(run: Callable[[Call, RowGroup], CallResult], call: Call, groups: Sequence[RowGroup]) -> CallResult:
    """Run a batch with one call per group of rows, and join the outputs in the order of the batch.

    Rows whose adapters do not give an extra output that others give are NaN in it, or 0 if it is of integers.

    Args:
        call: of all rows.
        groups: all rows, each in one of them.

    Raises:
        Unavailable: an output or extra output has no row per input row and differs between the calls.
    """
    if len(groups) == 1:
        return run(call, groups[0])
    total = sum(len(group.rows) for group in groups)
    selections = [RowSelection(group.rows, total) for group in groups]
    calls = [call.select(selection) for selection in selections]  # all of them, before one writes into its inputs
    results = [run(own, group) for own, group in zip(calls, groups, strict=True)]
    merger = _RowMerger(selections)
    merged = CallResult(merger.merge([r.output for r in results]), merger.merge_aux([r.aux for r in results]))
    merger.update_originals()
    return merged


class _RowMerger:
    """Joins the results of several calls.

    Args:
        selections: the inputs of each call.
    """

    def __init__(self, selections: Sequence[RowSelection]) -> None:
        self._selections = selections
        self._rows = [selection.rows for selection in selections]
        self._order = torch.argsort(torch.tensor([row for rows in self._rows for row in rows]))
        self._merged: dict[int, object] = {}
        self._updates: list[tuple[object, dict[str, object]]] = []

    def update_originals(self) -> None:
        """Give the input objects what the calls left in their copies, whether or not they were outputs; all or none."""
        for copies in zip(*(selection.copies.values() for selection in self._selections), strict=True):
            self._merge_objects([copied for copied, _ in copies])
        for original, attributes in self._updates:
            vars(original).update(attributes)

    def merge(self, parts: Sequence[Any]) -> Any:
        """Return one value made of the values of all calls, rows in the order of the batch."""
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
            next_step="call once per choice, or leave out what makes it (labels= make a loss of all rows)",
        )

    def merge_aux(self, parts: Sequence[AuxOutputs]) -> AuxOutputs:
        """Return the extra outputs of all calls, with filled-up rows for calls that lack one."""
        places = dict.fromkeys((name, path) for part in parts for name, outputs in part.items() for path in outputs)
        merged: dict[str, dict[str, object]] = {}
        for name, path in places:
            found: list[Any] = [part.get(name, {}).get(path) for part in parts]
            some = next(tensor for tensor in found if tensor is not None)
            rows = zip(found, self._rows, strict=True)
            filled = [_missing_rows(some, len(own)) if tensor is None else tensor for tensor, own in rows]
            merged.setdefault(name, {})[path] = self.merge(filled)
        return merged

    def _stack(self, parts: Sequence[Array]) -> Array:
        tensors = [part if isinstance(part, torch.Tensor) else torch.from_numpy(part) for part in parts]
        stacked = torch.cat(tensors)[self._order]
        return stacked if isinstance(parts[0], torch.Tensor) else stacked.numpy()

    def _merge_objects(self, parts: Sequence[object]) -> object:
        """Return one object: the original if the calls' objects are its copies, else a new one."""
        first = parts[0]
        if id(first) in self._merged:
            return self._merged[id(first)]
        _, original = self._selections[0].copies.get(id(first), (None, None))
        merged = self._merged[id(first)] = copy.copy(first) if original is None else original
        attributes = {name: self.merge([vars(part)[name] for part in parts]) for name in vars(first)}
        self._updates.append((merged, attributes))
        return merged


def _missing_rows(like: Array, rows: int) -> Array:
    """Return rows that hold nothing: NaN, or 0 in integers."""
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


# ── Generation ───────────────────────────────────────────────────────────────────────────────────────────────────────
def select_rows(options: Fields, rows: Sequence[int], total: int) -> Fields:
    """Return the inputs and options of ``generate`` for some of the rows.

    Args:
        options: of all rows.
        rows: the rows to select.
        total: the number of rows.
    """
    index = list(rows)
    selected = {name: value[index] if _is_batch(value, total) else value for name, value in options.items()}
    allowed = selected.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        selected["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(rows[row], ids)
    return selected


def _is_batch(value: object, total: int) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray) and value.ndim > 1 and value.shape[0] == total


@dataclass(frozen=True)
class OutputMerger:
    """Merges the outputs of several runs of ``generate``.

    Attributes:
        groups: the rows of each run.
        fill: the token id that fills up shorter sequences.
        beams: the number of beams of each row.
    """

    groups: Sequence[Sequence[int]]
    fill: int
    beams: int

    def merge(self, outputs: Sequence[Any]) -> Any:
        """Return sequences, or transformers' output object, for all rows; without a cache.

        Raises:
            Unavailable: an output belongs to one run alone.
        """
        if isinstance(outputs[0], torch.Tensor):
            return self._stack(outputs, self.fill)
        fields = {name: [output.get(name) for output in outputs] for name in list(outputs[0]) if name != "cache"}
        return type(outputs[0])(**{name: self._merge_field(name, values) for name, values in fields.items()})

    def _merge_field(self, name: str, values: Sequence[Any]) -> object:
        if name == "sequences":
            return self._stack(values, self.fill)
        if name == "sequences_scores":
            return self._stack([value[:, None] for value in values], 0)[:, 0]
        if name == "beam_indices":
            return self._stack([self._shift_beams(*pair) for pair in zip(values, self.groups, strict=True)], -1)
        if name in ("scores", "logits"):
            longest = max(map(len, values))
            padded = [[*steps, *[torch.zeros_like(steps[0])] * (longest - len(steps))] for steps in values]
            return tuple(self._stack(step, 0) for step in zip(*padded, strict=True))
        raise Unavailable(
            f"the {name} of rows that choose their own adapters, seeds or drafts cannot be merged",
            next_step="call once per choice, or leave out the option that asks for them",
        )

    def _shift_beams(self, indices: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Return indices into a run's own beams as indices into the beams of all rows."""
        first = torch.tensor(rows)[indices.clamp(min=0) // self.beams] * self.beams
        return torch.where(indices < 0, indices, first + indices % self.beams)

    def _stack(self, parts: Sequence[torch.Tensor], fill: int) -> torch.Tensor:
        """Return the rows of several runs in the batch's order, filled up on the right."""
        longest = max(part.shape[1] for part in parts)
        padded = [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
        copies = padded[0].shape[0] // len(self.groups[0])
        order = (
            torch.argsort(torch.tensor([row for rows in self.groups for row in rows]))[:, None] * copies
            + torch.arange(copies)
        ).flatten()
        return torch.cat(padded)[order]
