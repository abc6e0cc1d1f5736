"""The arguments of one call, example inputs as tensors, and arguments that are constants of a program."""

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
"""Argument of forward -> its value: a tensor, tensors in dicts, lists and tuples, or any other value."""
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call, like ``inspect.BoundArguments``.

    A call of a program has all arguments under the program's names (``Interface.bind``). A call of the model has the
    arguments as the caller passed them.

    Attributes:
        args: positional arguments; empty in a call of a program.
        kwargs: arguments by name.
        wants_tuple: whether the output is returned as a tuple instead of the model's own output class.
    """

    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)
    wants_tuple: bool = False

    @property
    def rows(self) -> int:
        """The number of rows of the first argument that has rows.

        Raises:
            ChoiceError: no argument has rows.
        """
        return count_rows((*self.args, *self.kwargs.values()))

    def select(self, selection: RowSelection) -> "Call":
        """Return the call with only the selected rows."""
        return replace(self, args=selection.select(self.args), kwargs=selection.select(dict(self.kwargs)))

    def cast(self, dtypes: Mapping[torch.dtype, torch.dtype], kept: Collection[object] = ()) -> "Call":
        """Return the call with tensors of some dtypes cast to others.

        Args:
            dtypes: dtype of a tensor -> the dtype to which it is cast.
            kept: tensors among the arguments that are not cast.
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
    """Cast arguments with one number per row to float32 in the inputs' library; expand a single number to all rows.

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
        next_step="give tensors of torch or arrays of NumPy, as in compiled(**tokenizer(text, return_tensors='pt'))",
    )


def convert_to_tensors(inputs: object) -> object:
    """Copy example inputs as tensors; a single tensor or array becomes a tuple of one."""
    copied = map_inputs(_copy, inputs)
    if isinstance(inputs, Tensor | np.ndarray):
        return (copied,)
    return tuple(copied) if isinstance(copied, list) else copied


def map_inputs(change: Callable[[object], object], inputs: object) -> object:
    """Apply ``change`` to each value of nested inputs; any mapping becomes a dict."""
    if isinstance(inputs, Mapping):
        return {name: map_inputs(change, inner) for name, inner in inputs.items()}
    if pytree.tree_is_leaf(inputs):
        return change(inputs)
    inner = functools.partial(map_inputs, change)
    return pytree.tree_map(inner, inputs, is_leaf=lambda value: isinstance(value, Mapping))


def _copy(value: object) -> object:
    """Copy a tensor, or an array of numbers as a tensor; return any other value unchanged.

    A tensor given for two arguments becomes two tensors, since a trace maps each tensor to one input.
    """
    if isinstance(value, Tensor):
        return value.detach().clone()
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) and value.dtype.kind in "biufc" else value


OUTPUT_SWITCHES = ("return_dict", "output_hidden_states", "output_attentions")
"""Arguments of transformers models that are also fields of the configuration."""
CAPTURE_CONFIG = {"use_cache": False}
"""Fields that a capture sets in the configuration of a transformers model: its graph keeps no cache."""


def to_numpy(tensor: Tensor) -> np.ndarray:
    """Return a tensor's values as an array; NumPy has no bfloat16, for which it is float32."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True)


def to_json_value(value: object) -> object:
    """Convert a value to JSON: tensors and arrays to lists of numbers, tuples to lists."""
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [to_json_value(inner) for inner in value]
    return {key: to_json_value(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
