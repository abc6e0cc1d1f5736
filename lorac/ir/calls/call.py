"""The arguments of one call, and example inputs as tensors."""

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lorac.argument_types import Fields
from lorac.errors import ChoiceError
from lorac.ir.calls.row_selection import RowSelection, count_rows

Inputs = Fields
"""Argument of forward -> its value: a tensor, tensors in dicts, lists and tuples, or anything else."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call, as ``inspect.BoundArguments`` holds them.

    All arguments of a call of a program have the program's names (``Interface.bind``). A call of the model itself holds
    them as they were given.

    Attributes:
        args: positional arguments; empty in a call of a program.
        kwargs: arguments by name.
        wants_tuple: whether a program's output is to be a tuple instead of the model's own output class.
    """

    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    wants_tuple: bool = False

    @property
    def rows(self) -> int:
        """The number of rows of the first argument that has rows.

        Raises:
            ChoiceError: there is none.
        """
        return count_rows((*self.args, *self.kwargs.values()))

    def select(self, selection: RowSelection) -> "Call":
        """Return the call of some of the rows."""
        return replace(self, args=selection.select(self.args), kwargs=selection.select(dict(self.kwargs)))

    def cast(self, dtypes: Mapping[torch.dtype, torch.dtype], kept: Collection[object] = ()) -> "Call":
        """Return the call with tensors of some dtypes cast to others.

        Args:
            dtypes: dtype of a tensor -> the dtype that it gets.
            kept: tensors among the arguments that are left as they are.
        """
        args, kwargs = cast_tensors((self.args, dict(self.kwargs)), dtypes, kept)
        return replace(self, args=args, kwargs=kwargs)


def cast_tensors(inputs: T, dtypes: Mapping[torch.dtype, torch.dtype], kept: Collection[object] = ()) -> T:
    """Return nested inputs with tensors of some dtypes cast to others (``Call.cast``)."""
    if not dtypes:
        return inputs
    left = {*map(id, kept)}

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if id(tensor) in left else tensor.to(dtypes.get(tensor.dtype, tensor.dtype))

    result: T = pytree.tree_map_only(torch.Tensor, cast, inputs)
    return result


def spread_over_rows(given: Mapping[str, object], row_numbers: Mapping[str, str]) -> dict[str, object]:
    """Return the arguments of a call with numbers per row as float32, in the library of the other inputs.

    Args:
        given: the arguments by name.
        row_numbers: argument with one number per row -> an argument with as many rows.
    """
    spread = dict(given)
    for name, rows_of in row_numbers.items():
        shape = getattr(spread.get(rows_of), "shape", ())
        if name in spread and shape:
            numbers = torch.as_tensor(spread[name]).to(torch.float32)
            numbers = numbers.expand(shape[0]) if numbers.numel() == 1 and numbers.dim() <= 1 else numbers
            spread[name] = numbers.numpy(force=True) if isinstance(spread[rows_of], np.ndarray) else numbers
    return spread


def not_numbers_error(name: str, reason: object) -> ChoiceError:
    """Return the error for an input that is not an array of numbers."""
    return ChoiceError(
        f"input '{name}' is not an array of numbers: {reason}",
        next_step="give tensors of torch or arrays of NumPy; tokenizers make them with return_tensors='pt'",
    )


def convert_to_tensors(inputs: object) -> object:
    """Return example inputs as tensors with memory of their own; a single tensor or array becomes a tuple of one."""
    copied = map_inputs(_copy, inputs)
    if isinstance(inputs, Tensor | np.ndarray):
        return (copied,)
    return tuple(copied) if isinstance(copied, list) else copied


def map_inputs(change: Callable[[object], object], inputs: object) -> object:
    """Return inputs with each value changed, in any nesting; any mapping becomes a dict."""
    if isinstance(inputs, Mapping):
        return {name: map_inputs(change, inner) for name, inner in inputs.items()}
    if pytree.tree_is_leaf(inputs):
        return change(inputs)
    inner = functools.partial(map_inputs, change)
    return pytree.tree_map(inner, inputs, is_leaf=lambda value: isinstance(value, Mapping))


def _copy(value: object) -> object:
    """Return a tensor, or an array of numbers as a tensor, in memory of its own; any other value itself.

    One tensor given for two arguments becomes two, since a trace takes one tensor for one input.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" else value
