"""Default dynamic shapes of a capture: the batch axes and sequence axes of the inputs."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import Dim
from torch.utils import _pytree as pytree

from lorac.ir.calls.call import Inputs, spread_over_rows
from lorac.ir.calls.row_layout import RowLayout, count_along

if TYPE_CHECKING:
    from lorac.frontend.host import Host

_SAMPLES = "input_values"
_BATCH, _PACKED = "batch", "packed"
"""Names of sizes: the number of rows, and the number of items concatenated over all rows."""


def make_dynamic_shapes(host: Host, inputs: Inputs, *, named: bool = True) -> dict[str, object]:
    """Return dynamic shapes: batch of every tensor, length of sequences and sounds, sides of latents.

    The rows of token ids are the batch. An input with several items per row, such as the concatenated patches of all
    images, has a size that torch may narrow.

    Args:
        host: the model, which names the axes, and bounds the length if positions are in a table.
        inputs: the example inputs by name; the result has the same nesting.
        named: ``Dim``s called batch, length and decoder_length; else ``Dim.AUTO``, which lets torch narrow them.
    """
    leaves = pytree.tree_leaves_with_path(dict(inputs))
    values = {_name_leaf(path): value for path, value in leaves}
    sequences = host.find_sequence_host()
    sequence_rows = None if sequences is None else sequences.count_rows(values)
    longest = None if sequences is None else sequences.longest
    tensors = (value for _, value in leaves if isinstance(value, Tensor) and value.dim())
    batch = sequence_rows if sequence_rows is not None else next((value.shape[0] for value in tensors), None)
    # Strided windows over samples restrict the number of samples; a patch count per row restricts the patches.
    free = {"samples", _PACKED, *host.free_sizes}

    @functools.cache
    def size(name: str) -> object:
        return Dim(name, max=None if name == _BATCH else longest) if named and name not in free else Dim.AUTO

    def axes(path: pytree.KeyPath, value: object) -> dict[int, object] | None:
        if not isinstance(value, Tensor):
            return None
        name, along = _name_leaf(path), dict[int, str]()
        for source in (sequences, host) if sequences is not host else (host,):
            along |= {} if source is None else source.axes(name, value, values)
        if name == _SAMPLES and value.dim() == 2:  # (rows, samples)
            along[1] = "samples"
        if value.dim() and batch and _BATCH not in along.values():
            packed = sequence_rows is not None and value.shape[0] % batch == 0
            rows = {0: _BATCH} if value.shape[0] == batch else {0: _PACKED} if packed else {}
            along = rows | along
        return {axis: size(name) for axis, name in along.items()}

    shapes: dict[str, object] = pytree.tree_map_with_path(axes, dict(inputs))
    return shapes


def _name_leaf(path: pytree.KeyPath) -> str:
    """Return the name of an input, or of a tensor in a dict; tensors in a list have the list's name."""
    return next(str(key.key) for key in reversed(path) if isinstance(key, pytree.MappingKey))


def let_narrow(shapes: object) -> object:
    """Return dynamic shapes that torch may restrict, but not fix: each named ``Dim`` becomes a hint.

    torch refuses a named ``Dim`` if it excludes any size, such as 1, even if the model does not.
    """
    return pytree.tree_map_only(Dim, lambda dim: Dim.DYNAMIC, shapes)


def fix_hinted_axes(shapes: object) -> object:
    """Return dynamic shapes in which axes with ``Dim.AUTO`` are fixed, except first axes, which are the batch."""

    def fix(path: pytree.KeyPath, dim: object) -> object:
        axis = getattr(path[-1], "key", getattr(path[-1], "idx", 0)) if path else 0
        return Dim.STATIC if axis and dim == Dim.AUTO else dim

    return pytree.tree_map_with_path(fix, shapes)


def list_dynamic_axes(axes: object) -> list[int]:
    """Return the axes of a tensor that its dynamic shapes declare as dynamic.

    Args:
        axes: as torch.export takes them: ``Dim``s or hints by axis, or in order; None for a fixed axis.
    """
    pairs = axes.items() if isinstance(axes, Mapping) else enumerate(axes) if isinstance(axes, list | tuple) else ()
    return [axis for axis, dim in pairs if dim is not None and not isinstance(dim, int) and dim != Dim.STATIC]


def repeat_unit_axes(value: Any, axes: Any) -> Any:
    """Repeat each dynamic axis of size 1 once, since torch.export treats size 1 as a constant.

    Args:
        value: a tensor, or tensors in dicts, lists and tuples.
        axes: its dynamic shapes, with the same nesting.
    """
    if isinstance(value, Mapping) and isinstance(axes, Mapping):
        return type(value)({name: repeat_unit_axes(inner, axes.get(name)) for name, inner in value.items()})  # type: ignore[call-arg]  # a dict
    if type(value) in {list, tuple} and isinstance(axes, list | tuple):
        return type(value)(repeat_unit_axes(inner, own) for inner, own in zip(value, axes, strict=False))
    if not isinstance(value, Tensor):
        return value
    unit = [axis for axis in list_dynamic_axes(axes) if value.shape[axis] == 1]
    return value.repeat([2 if axis in unit else 1 for axis in range(value.dim())]) if unit else value


def repeat_unit_axes_of_inputs(host: Host, inputs: object, dynamic_shapes: object) -> object:
    """Apply ``repeat_unit_axes`` to each input; inputs are by name or in order."""
    shapes, named = host.bind_values(dynamic_shapes), host.bind_values(inputs)
    values = {name: repeat_unit_axes(value, shapes.get(name)) for name, value in named.items()}
    if isinstance(inputs, Mapping):
        return values
    return inspect.BoundArguments(inspect.signature(host.model.forward), OrderedDict(values)).args


def spread_row_numbers(host: Host, inputs: object, shapes: object) -> tuple[object, object]:
    """Expand a single number to one number per row, in example inputs and dynamic shapes, where the host takes such.

    A program can then be called with the numbers of any scheduler: one number for all rows, of any dtype.
    """
    named = host.bind(inputs) if host.row_numbers and inputs is not None else {}
    rows_of = next((name for name, value in named.items() if isinstance(value, Tensor) and value.dim() > 1), None)
    numbers = [name for name in host.row_numbers if name in named and torch.as_tensor(named[name]).dim() < 2]
    if rows_of is None or not numbers:
        return inputs, shapes
    spread = spread_over_rows(named, dict.fromkeys(numbers, rows_of))
    if shapes is None:
        return spread, None
    given = host.bind_values(shapes)
    axes = given.get(rows_of)
    first = axes.get(0) if isinstance(axes, Mapping) else axes[0] if axes else None
    return spread, {**given, **{name: {0: first} for name in numbers}}


def find_row_numbers(host: Host, values: Mapping[str, Tensor]) -> dict[str, str]:
    """Return each input with one number per row -> another input with the same rows.

    Args:
        values: input -> a tensor of its shape; sizes may be symbolic.
    """
    found: dict[str, str] = {}
    for name in host.row_numbers:
        if name in values and values[name].dim() == 1:
            size = str(values[name].shape[0])
            alike = [other for other, value in values.items() if value.dim() > 1 and str(value.shape[0]) == size]
            found |= {name: alike[0]} if alike else {}
    return found


def find_row_layout(host: Host, inputs: Inputs, constants: Inputs) -> RowLayout | None:
    """Return the row axes of an example call; None if no input has rows.

    Args:
        inputs: the captured inputs by name.
        constants: arguments that are constants of the program.
    """
    shapes = make_dynamic_shapes(host, inputs)
    free = {name: axes.items() if isinstance(axes, Mapping) else () for name, axes in shapes.items()}
    named = {
        name: next((axis for axis, dim in axes if getattr(dim, "__name__", "") == _BATCH), None)
        for name, axes in free.items()
    }
    first, axis = next(((name, axis) for name, axis in named.items() if axis is not None), ("", 0))
    if not first:
        return None
    count = count_along(inputs[first], axis)
    axes = {first: axis}
    for name, value in {**inputs, **constants}.items():
        size = count_along(value, named.get(name) or 0)
        if size and size % count == 0:
            axes.setdefault(name, named.get(name) or 0)
    return RowLayout(count, axes)
