"""One choice of adapters per row of a batch.

What has rows is found in any nesting: in mappings, tuples and lists, and in the attributes of objects, such as the
caches of decoders, whose layers hold a tensor with one row per sequence. An object that is given is given to each call
as a copy with the call's rows, and holds afterwards what a single call would have left in it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lorac.errors import ChoiceError, Unavailable
from lorac.ir.slots.choice import ChoiceSpec
from lorac.target.engine import AuxOutputs, CallResult


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Rows of the first input that has any."""
    for value in (*args, *kwargs.values()):
        if _has_rows(value):
            return int(value.shape[0])
    raise ChoiceError(
        "no input has rows, so adapters= cannot be a list", next_step="give one choice for the whole call"
    )


def check_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], choices: Sequence[ChoiceSpec]) -> None:
    """Raise ``ChoiceError`` unless there is one choice per row."""
    rows = batch_size(args, kwargs)
    if rows != len(choices):
        raise ChoiceError(
            f"{len(choices)} choices of adapters for {rows} rows",
            next_step="give one choice per row, or a single choice for all",
        )


def run_rows(
    run: Callable[[tuple[Any, ...], dict[str, Any], ChoiceSpec], CallResult],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    choices: Sequence[ChoiceSpec],
) -> CallResult:
    """Run a batch whose rows choose differently, one call per distinct choice, rows put back in order.

    Of an extra output that the adapters of some rows do not give, those rows are NaN (of whole numbers 0).

    Args:
        run: one call.
        args, kwargs: of all rows.
        choices: of each row.

    Raises:
        ChoiceError: rows and choices differ in number.
        Unavailable: an output, or an extra one, has no row per input row, and differs between the calls.
    """
    check_rows(args, kwargs, choices)
    groups: dict[str, list[int]] = {}
    for row, choice in enumerate(choices):
        groups.setdefault(repr(choice), []).append(row)
    if len(groups) == 1:
        return run(args, dict(kwargs), choices[0])
    given = [_RowSelection(rows, len(choices)) for rows in groups.values()]
    inputs = [(taken.rows_of(args), taken.rows_of(dict(kwargs))) for taken in given]
    outputs = [run(own, named, choices[taken.rows[0]]) for taken, (own, named) in zip(given, inputs, strict=True)]
    gathered = _RowMerger(given)
    answer = CallResult(gathered.whole([found.output for found in outputs]), gathered.extra([f.aux for f in outputs]))
    gathered.write_back()
    return answer


@dataclass
class _RowSelection:
    """What one call gets of the inputs.

    Attributes:
        rows: its rows.
        total: how many there are.
        copies: identity of a copy that was made of an object -> the copy and the object, in the order of the inputs.
    """

    rows: list[int]
    total: int
    copies: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    _made: dict[int, Any] = field(default_factory=dict)

    def rows_of(self, value: Any) -> Any:
        """A value with these rows of everything that has one per row of the batch."""
        if isinstance(value, Mapping):
            return {key: self.rows_of(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self.rows_of(item) for item in value)
        if _has_rows(value):
            return value[self.rows] if value.shape[0] == self.total else value
        return value if _object_attributes(value) is None else self._copied(value)

    def _copied(self, value: Any) -> Any:
        if id(value) in self._made:
            return self._made[id(value)]
        made = self._made[id(value)] = copy.copy(value)
        if made is value:  # such as a member of an enum: there is one of it
            return value
        self.copies[id(made)] = (made, value)
        vars(made).update({name: self.rows_of(part) for name, part in vars(value).items()})
        return made


class _RowMerger:
    """The answers of several calls as one.

    Args:
        given: what each call got.
    """

    def __init__(self, given: Sequence[_RowSelection]) -> None:
        self._rows = [taken.rows for taken in given]
        self._order = torch.argsort(torch.tensor([row for rows in self._rows for row in rows]))
        self._given = given
        self._known: dict[int, Any] = {}
        self._held: list[tuple[Any, dict[str, Any]]] = []

    def write_back(self) -> None:
        """Have the objects that were given hold what the calls left in the copies, answered or not: all or none."""
        for copies in zip(*(taken.copies.values() for taken in self._given), strict=True):
            self._object([made for made, _ in copies])
        for made, held in self._held:
            vars(made).update(held)

    def whole(self, parts: Sequence[Any]) -> Any:
        """One value of those of the calls, rows in the batch's order."""
        first = parts[0]
        if isinstance(first, Mapping):
            merged = {key: self.whole([part[key] for part in parts]) for key in first}
            return merged if type(first) is dict else type(first)(**merged)
        if isinstance(first, tuple | list):
            return type(first)(self.whole(items) for items in zip(*parts, strict=True))
        if self._by_row(parts):
            return self._stacked(parts)
        if _object_attributes(first) is not None:
            return self._object(parts)
        if all(_values_equal(first, part) for part in parts[1:]):
            return first
        raise Unavailable(
            "an output has no row per input row, so rows cannot choose their own adapters",
            next_step="call once per choice, or leave out what makes it (labels= make a loss of all rows)",
        )

    def extra(self, parts: Sequence[AuxOutputs]) -> AuxOutputs:
        """The extra outputs of all calls as those of one."""
        places = dict.fromkeys((name, path) for part in parts for name, found in part.items() for path in found)
        whole: dict[str, dict[str, Any]] = {}
        for name, path in places:
            found = [part.get(name, {}).get(path) for part in parts]
            some = next(tensor for tensor in found if tensor is not None)
            rows = zip(found, self._rows, strict=True)
            filled = [_missing_rows(some, len(own)) if tensor is None else tensor for tensor, own in rows]
            whole.setdefault(name, {})[path] = self.whole(filled)
        return whole

    def _by_row(self, parts: Sequence[Any]) -> bool:
        return all(_has_rows(part) and part.shape[0] == len(rows) for part, rows in zip(parts, self._rows, strict=True))

    def _stacked(self, parts: Sequence[Any]) -> Any:
        as_torch = isinstance(parts[0], torch.Tensor)
        stacked = torch.cat([part if as_torch else torch.from_numpy(part) for part in parts])[self._order]
        return stacked if as_torch else stacked.numpy()

    def _object(self, parts: Sequence[Any]) -> Any:
        """An object of those of the calls: the one that was given where they are its copies, else another such."""
        first = parts[0]
        if id(first) in self._known:
            return self._known[id(first)]
        _, made = self._given[0].copies.get(id(first), (None, None))
        made = self._known[id(first)] = copy.copy(first) if made is None else made
        self._held.append((made, {name: self.whole([vars(part)[name] for part in parts]) for name in vars(first)}))
        return made


def _missing_rows(tensor: Any, rows: int) -> Any:
    """Rows such as a tensor's that hold nothing."""
    shape = (rows, *tensor.shape[1:])
    if isinstance(tensor, torch.Tensor):
        return tensor.new_full(shape, math.nan if tensor.is_floating_point() else 0)
    return np.full(shape, math.nan if np.issubdtype(tensor.dtype, np.floating) else 0, dtype=tensor.dtype)


def _has_rows(value: Any) -> bool:
    return len(getattr(value, "shape", ())) > 0


def _object_attributes(value: Any) -> Mapping[str, Any] | None:
    """The attributes of an object that holds some; None for what is one thing: a class, a function, a model."""
    if isinstance(value, type | torch.Tensor | torch.nn.Module) or callable(value):
        return None
    held = getattr(value, "__dict__", None)
    return held if isinstance(held, dict) else None


def _values_equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    return bool(type(one) is type(other) and one == other)
