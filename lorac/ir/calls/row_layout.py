"""Rows of a call: the parts of its arguments and outputs that belong to each row.

A forward that loops over its rows in Python, or reads the image sizes of each row, is traced for the number of rows in
the example. Where rows are independent, such a program serves any number of rows in several calls. The last call is
padded with copies of a row, whose outputs are dropped.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.errors import ArtifactError, InputMismatch

LIST_AXIS = -1
"""Value for the axis of an output that is a list of items."""


@dataclass(frozen=True)
class RowLayout:
    """The row axes of a call's arguments and outputs.

    Attributes:
        count: number of rows that the program takes.
        axes: argument -> its row axis, along which each row has the same number of items. The first argument has
            one item per row.
        outputs: path of an output -> its row axis, or ``LIST_AXIS`` for a list or a tuple with the same number of
            items for each row.
    """

    count: int
    axes: Mapping[str, int]
    outputs: Mapping[str, int] = field(default_factory=dict)

    def count_rows(self, given: Mapping[str, object]) -> int:
        """Return the number of rows of a call."""
        first, axis = next(iter(self.axes.items()))
        return count_along(given[first], axis) if first in given else self.count

    def split(self, given: Mapping[str, object]) -> list[dict[str, Any]]:
        """Split a call into calls of ``count`` rows each.

        Raises:
            InputMismatch: an argument does not have the same number of items for each row.
        """
        total = self.count_rows(given)
        starts = range(0, total, self.count)
        return [self.select(given, [min(start + i, total - 1) for i in range(self.count)]) for start in starts]

    def select(self, given: Mapping[str, object], rows: Sequence[int]) -> dict[str, Any]:
        """Select rows of a call, in this order; return the arguments."""
        total, selected = self.count_rows(given), dict(given)
        for name, axis in self.axes.items():
            if name not in given:
                continue
            value = given[name]
            each, odd = divmod(count_along(value, axis), total)
            if odd or not each:
                raise InputMismatch(
                    f"argument '{name}' has size {count_along(value, axis)} on axis {axis}, which does not divide into "
                    f"{total} rows",
                    next_step="give the same number of items for each row",
                )
            places = [row * each + i for row in rows for i in range(each)]
            if isinstance(value, Tensor):
                selected[name] = value.index_select(axis, torch.tensor(places, device=value.device))
            elif isinstance(value, np.ndarray):
                selected[name] = value.take(places, axis)
            else:
                assert isinstance(value, list | tuple)
                selected[name] = [value[place] for place in places]
        return selected

    def join(self, values: Sequence[Any], total: int, axis: int | None = 0) -> Any:
        """Concatenate one output of several calls, and drop padding rows.

        Args:
            values: the output of each call.
            total: number of rows of all calls, without padding.
            axis: the row axis; None for an output without rows.
        """
        first = values[0]
        if axis is None or not getattr(first, "ndim", 0) or first.shape[axis] % self.count:
            return first
        size = self.scale(first.shape[axis], total)
        if isinstance(first, Tensor):
            return torch.cat(list(values), axis).narrow(axis, 0, size)
        return np.concatenate(list(values), axis).take(range(size), axis)

    def find_axis(self, size: Sequence[int], whole: Sequence[int], total: int) -> int | None:
        """Return the one axis along which an output grows in proportion to the rows; None if there is no such axis."""
        grows = [i for i, (own, other) in enumerate(zip(size, whole, strict=True)) if own != other]
        fits = len(grows) == 1 and size[grows[0]] % self.count == 0
        return grows[0] if fits and whole[grows[0]] == self.scale(size[grows[0]], total) else None

    def scale(self, size: int, total: int) -> int:
        """Return the number of items of ``total`` rows, where ``count`` rows have ``size`` items."""
        return total * (size // self.count)

    def to_json(self) -> dict[str, object]:
        """Return the layout as JSON."""
        return {"count": self.count, "axes": dict(self.axes), "outputs": dict(self.outputs)}

    @classmethod
    def from_json(cls, stored: JsonMapping) -> "RowLayout":
        """Read the layout from JSON.

        Raises:
            ArtifactError: ``stored`` is not a layout that lorac stores.
        """
        count, axes, outputs = stored["count"], dict(stored["axes"]), dict(stored["outputs"])
        least = [(count, 1), *((axis, 0) for axis in axes.values()), *((axis, LIST_AXIS) for axis in outputs.values())]
        if not axes or not all(type(number) is int and number >= low for number, low in least):
            raise ArtifactError(f"the stored layout of rows is damaged: {count!r} rows along the axes {axes!r}")
        return cls(count, axes, outputs)


def count_along(value: object, axis: int) -> int:
    """Return the length of a tensor, an array or a list along an axis; 0 if it has no such axis."""
    if isinstance(value, Tensor | np.ndarray):
        return int(value.shape[axis]) if value.ndim > axis else 0
    return len(value) if isinstance(value, list | tuple) and axis == 0 else 0
