"""Arguments of a call that a program holds as constants: what is no tensor, and tensors that forward reads as numbers.

A trace follows Python, so whatever Python decides by is decided for good: a number, a text, a list of sizes. Such an
argument is no input of the program but part of what it is, and a call that says otherwise is refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from lorac.errors import CaptureFailed, short
from lorac.ir.host.derived import POSITIONS, SIZES, Positions
from lorac.ir.host.example_inputs import Inputs, is_hugging_face


@dataclass(frozen=True)
class Arguments:
    """The arguments of an example call, each by name.

    Attributes:
        inputs: what become inputs of a program.
        fixed: what become constants of it, as the caller gave them.
        read: those of the constants that are tensors for the caller -> the numbers that forward reads in their place.
        positions: what makes the positions among the inputs, where the caller gave none.
    """

    inputs: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    positions: Positions | None = None

    @property
    def traced(self) -> dict[str, Any]:
        """The constants as forward is given them in a trace."""
        return self.fixed | self.read

    def with_known_sizes(self) -> Arguments | None:
        """The same where the sizes of images are constants; None where there are none that could be."""
        named = {name: value for name, value in self.inputs.items() if name.endswith(SIZES)}
        sizes = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        left = {name: value for name, value in self.inputs.items() if name not in sizes}
        return Arguments(left, self.fixed | sizes, self.read | sizes, self.positions) if sizes else None

    @classmethod
    def of(cls, model: nn.Module, named: Inputs) -> Arguments:
        """An example call's arguments, told apart.

        Raises:
            CaptureFailed: an argument that is no tensor, and nothing that later calls can be held against.
        """
        read = _read_as_numbers(model, named)
        fixed = {name: value for name, value in named.items() if name in read or not _holds_tensors(name, value)}
        for name, value in fixed.items():
            if name not in read and not _is_kept(value):
                raise CaptureFailed(
                    f"the argument '{name}' holds {short(value)}, which no program can take or hold",
                    next_step="give tensors, numbers, texts, or lists and dicts of them; target='eager' takes anything",
                )
        inputs = {name: value for name, value in named.items() if name not in fixed}
        positions = None if POSITIONS in named else Positions.of(model)
        made = None if positions is None else positions.made(named)
        return cls(inputs, fixed, read) if made is None else cls({**inputs, POSITIONS: made}, fixed, read, positions)


@contextlib.contextmanager
def computed_at_once(constants: Mapping[str, Any]) -> Iterator[None]:
    """Inside the block, what is computed of constants alone is computed, and not traced: numbers can be read off it.

    Args:
        constants: as a traced forward is given them; without a tensor among them everything is traced.
    """
    tensors = any(isinstance(value, Tensor) for value in constants.values())
    with _AtOnce() if tensors else contextlib.nullcontext():
        yield


class _AtOnce(TorchFunctionMode):
    """Runs functions of tensors that are no part of a trace, and those that make tensors of numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        leaves = pytree.tree_leaves((args, given))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        symbols = any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves)
        known = all(type(tensor) is Tensor for tensor in tensors) if tensors else func in _MAKERS
        if symbols or not known:
            return func(*args, **given)
        with _disable_current_modes():
            return func(*args, **given)


_MAKERS = frozenset({torch.arange, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros})


def plain(value: Any) -> Any:
    """A value as JSON has it: tensors and arrays as lists of numbers, tuples as lists."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return {key: plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _is_kept(value: Any) -> bool:
    """Whether an argument is the same after it was stored."""
    try:
        return bool(json.loads(json.dumps(value)) == plain(value))
    except (TypeError, ValueError):
        return False


def _holds_tensors(name: str, value: Any) -> bool:
    """Whether an argument is a tensor, or nothing but tensors in dicts, lists and tuples.

    Raises:
        CaptureFailed: it holds tensors and other things.
    """
    leaves = pytree.tree_leaves(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if leaf is not None and not isinstance(leaf, Tensor)]
    if tensors and others:
        raise CaptureFailed(
            f"the argument '{name}' holds tensors beside {short(others[0])}: inputs and constants of a program in one",
            next_step="give them as arguments of their own; target='eager' takes them together",
        )
    return bool(tensors)


def _read_as_numbers(model: nn.Module, named: Inputs) -> dict[str, Any]:
    """Tensors that a model of transformers reads as numbers, the sizes of images for one, as its exporter has them."""
    if not is_hugging_face(model):
        return {}
    from transformers.exporters.utils import precompute_export_inputs

    prepared = dict(named)
    with contextlib.suppress(Exception):  # what it makes of arguments that are no model's own
        precompute_export_inputs(model, prepared)
    tensors = [name for name, value in named.items() if isinstance(value, Tensor)]
    return {name: prepared[name] for name in tensors if not isinstance(prepared[name], Tensor)}
