"""The arguments of one call."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch.utils import _pytree as pytree

from lorac.ir.calls.row_selection import RowSelection, count_rows

RETURN_DICT = "return_dict"
"""The argument by which models of transformers and diffusers return a tuple: the program's tensors stay the same."""


T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Call:
    """The arguments of one call, as ``inspect.BoundArguments`` holds them.

    All arguments of a call of a program have the program's names (``Interface.bind``). A call of the model itself holds
    them as they were given.

    Attributes:
        args: positional arguments; empty in a call of a program.
        kwargs: arguments by name.
    """

    args: tuple[object, ...] = ()
    kwargs: Mapping[str, object] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The number of rows of the first argument that has rows.

        Raises:
            ChoiceError: there is none.
        """
        return count_rows((*self.args, *self.kwargs.values()))

    @property
    def wants_tuple(self) -> bool:
        """Whether the output is to be a tuple instead of the model's own output class."""
        return self.kwargs.get(RETURN_DICT, True) is False

    def select(self, selection: RowSelection) -> "Call":
        """Return the call of some of the rows."""
        return Call(selection.select(self.args), selection.select(dict(self.kwargs)))

    def cast(self, dtypes: Mapping[torch.dtype, torch.dtype], kept: Collection[object] = ()) -> "Call":
        """Return the call with tensors of some dtypes cast to others.

        Args:
            dtypes: dtype of a tensor -> the dtype that it gets.
            kept: tensors among the arguments that are left as they are.
        """
        return Call(*cast_tensors((self.args, dict(self.kwargs)), dtypes, kept))


def cast_tensors(inputs: T, dtypes: Mapping[torch.dtype, torch.dtype], kept: Collection[object] = ()) -> T:
    """Return nested inputs with tensors of some dtypes cast to others (``Call.cast``)."""
    if not dtypes:
        return inputs
    left = {*map(id, kept)}

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if id(tensor) in left else tensor.to(dtypes.get(tensor.dtype, tensor.dtype))

    result: T = pytree.tree_map_only(torch.Tensor, cast, inputs)
    return result
