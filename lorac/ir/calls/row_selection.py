"""Selection of rows in a call's inputs: in mappings, tuples, lists, and the attributes of objects, nested or not."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch

from lorac.errors import ChoiceError

Array = torch.Tensor | np.ndarray
T = TypeVar("T")


def count_rows(values: Iterable[object]) -> int:
    """Return the number of rows of the first input that has rows."""
    for value in values:
        if has_rows(value):
            return int(value.shape[0])
    raise ChoiceError(
        "no input has rows, so adapters= cannot be a list", next_step="give one choice for the whole call"
    )


@dataclass
class RowSelection:
    """A selection of rows of a call's inputs.

    Attributes:
        rows: the row indices; a row may occur several times.
        total: the number of rows of the batch.
        copies: id of the copy of an object -> the copy and the original, in the order of the inputs.
    """

    rows: list[int]
    total: int
    copies: dict[int, tuple[object, object]] = field(default_factory=dict)
    _copy_of: dict[int, object] = field(default_factory=dict)

    def select(self, value: T) -> T:
        """Return a value in which every array with one row per row of the batch has only the selected rows."""
        result: Any
        if isinstance(value, Mapping):
            result = {key: self.select(item) for key, item in value.items()}
        elif isinstance(value, tuple | list):
            result = type(value)(self.select(item) for item in value)
        elif has_rows(value):
            result = value[self.rows] if value.shape[0] == self.total else value
        else:
            result = value if object_attributes(value) is None else self._copy(value)
        return result

    def _copy(self, value: object) -> object:
        if id(value) in self._copy_of:
            return self._copy_of[id(value)]
        copied = self._copy_of[id(value)] = copy.copy(value)
        if copied is value:  # the object does not copy, such as a member of an enum
            return value
        self.copies[id(copied)] = (copied, value)
        vars(copied).update({name: self.select(part) for name, part in vars(value).items()})
        return copied


def has_rows(value: object) -> TypeGuard[Array]:
    """Return whether a value is an array with a first axis."""
    return isinstance(value, torch.Tensor | np.ndarray) and value.ndim > 0


def object_attributes(value: object) -> Mapping[str, object] | None:
    """Return the attributes of an object; None for a class, a function, a module, or an object without any."""
    if isinstance(value, type | torch.Tensor | torch.nn.Module) or callable(value):
        return None
    attributes = getattr(value, "__dict__", None)
    return attributes if isinstance(attributes, dict) else None
