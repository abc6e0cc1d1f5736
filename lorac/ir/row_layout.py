"""Rows of a call: which parts of its arguments belong to which row, for programs that take a fixed number of them.

A forward that loops over its rows in Python, or that reads sizes of the images of each, is traced for as many rows as
it was shown. Where rows do not know of one another, such a program answers any number of them, in parts: each of the
rows it takes, the last filled up with a row once more, whose answer is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lorac.errors import ArtifactError, InputMismatch
from lorac.frontend.example_inputs import make_dynamic_shapes

_BATCH = "batch"
LIST_AXIS = -1
"""In the place of an axis: parts of a list."""


@dataclass(frozen=True)
class RowLayout:
    """Where the rows of a call are.

    Attributes:
        count: how many a program takes.
        axes: argument -> the axis along which its rows lie, one after another, each with as many places as the others.
            The first has one place a row.
        outputs: of what a model answers, by its path: a tensor's axis of rows, or ``LISTED`` for a list or a tuple that
            holds as many parts for each row.
    """

    count: int
    axes: Mapping[str, int]
    outputs: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, inputs: Mapping[str, Any], constants: Mapping[str, Any]) -> RowLayout | None:
        """The rows of an example call; None where nothing has any.

        Args:
            model, inputs: as captured, by name.
            constants: arguments that a program holds.
        """
        shapes = make_dynamic_shapes(model, inputs)
        named = {name: _batch(axes) for name, axes in shapes.items()}
        first = next((name for name, axis in named.items() if axis is not None), None)
        if first is None:
            return None
        count = _size(inputs[first], named[first] or 0)
        found = {first: named[first] or 0}
        for name, value in {**inputs, **constants}.items():
            axis = named.get(name) or 0
            size = _size(value, axis)
            if size and size % count == 0:
                found.setdefault(name, axis)
        return cls(count, found)

    def total(self, given: Mapping[str, Any]) -> int:
        """How many rows a call has."""
        first, axis = next(iter(self.axes.items()))
        return _size(given[first], axis) if first in given else self.count

    def split(self, given: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The arguments of each part of a call.

        Raises:
            InputMismatch: an argument has no equal share for each row.
        """
        total = self.total(given)
        starts = range(0, total, self.count)
        return [self.taken(given, [min(start + i, total - 1) for i in range(self.count)]) for start in starts]

    def taken(self, given: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
        """The arguments of some rows of a call, in that order."""
        total = self.total(given)
        return {
            name: _taken(name, value, self.axes[name], rows, total) if name in self.axes else value
            for name, value in given.items()
        }

    def whole(self, values: Sequence[Any], total: int, axis: int | None = 0) -> Any:
        """One output of a call of so many rows, of those of its parts.

        Args:
            values: the output of each part.
            total: how many rows.
            axis: where they lie; None where it has none.
        """
        first = values[0]
        if axis is None or not getattr(first, "ndim", 0) or first.shape[axis] % self.count:
            return first
        kept = self.share(first.shape[axis], total)
        if isinstance(first, Tensor):
            return torch.cat(list(values), axis).narrow(axis, 0, kept)
        return np.concatenate(list(values), axis).take(range(kept), axis)

    def axis_of(self, size: Sequence[int], whole: Sequence[int], total: int) -> int | None:
        """The axis along which an output grows with the program's rows; None where it is none, or not in step."""
        grows = [i for i, (own, other) in enumerate(zip(size, whole, strict=True)) if own != other]
        fits = len(grows) == 1 and size[grows[0]] % self.count == 0
        return grows[0] if fits and whole[grows[0]] == self.share(size[grows[0]], total) else None

    def share(self, size: int, total: int) -> int:
        """How many places a call of so many rows has, where the program has so many for its own."""
        return total * (size // self.count)

    def to_json(self) -> dict[str, Any]:
        """The rows as JSON."""
        return {"count": self.count, "axes": dict(self.axes), "outputs": dict(self.outputs)}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> RowLayout:
        """The inverse of ``to_json``.

        Raises:
            ArtifactError: it is not what lorac stores.
        """
        count, axes, outputs = stored["count"], dict(stored["axes"]), dict(stored["outputs"])
        least = [(count, 1), *((axis, 0) for axis in axes.values()), *((axis, LIST_AXIS) for axis in outputs.values())]
        if not axes or not all(type(number) is int and number >= low for number, low in least):
            raise ArtifactError(f"a stored program takes {count!r} rows along {axes!r}, which are no rows")
        return cls(count, axes, outputs)


def _batch(axes: Any) -> int | None:
    """The axis of rows among an input's dynamic axes."""
    named = axes.items() if isinstance(axes, Mapping) else ()
    return next((axis for axis, dim in named if getattr(dim, "__name__", "") == _BATCH), None)


def _size(value: Any, axis: int) -> int:
    """How long a tensor, an array or a list is along an axis; 0 where it has none."""
    if isinstance(value, Tensor | np.ndarray):
        return int(value.shape[axis]) if value.ndim > axis else 0
    return len(value) if isinstance(value, list | tuple) and axis == 0 else 0


def _taken(name: str, value: Any, axis: int, rows: Sequence[int], total: int) -> Any:
    each, odd = divmod(_size(value, axis), total)
    if odd or not each:
        raise InputMismatch(
            f"argument '{name}' has size {_size(value, axis)} on axis {axis}, no equal share for each of {total} rows",
            next_step="give each row as many",
        )
    places = [row * each + i for row in rows for i in range(each)]
    if isinstance(value, Tensor):
        return value.index_select(axis, torch.tensor(places, device=value.device))
    return value.take(places, axis) if isinstance(value, np.ndarray) else [value[place] for place in places]
