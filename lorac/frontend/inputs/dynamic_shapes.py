"""Default dynamic shapes of a capture: which axes of the inputs are the batch, and which run along a sequence."""

import inspect
import itertools
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lorac.frontend.hugging_face import is_hugging_face
from lorac.frontend.inputs.call_binding import Inputs, bind_arguments
from lorac.frontend.inputs.diffusers_models import IMAGE_AXES, list_image_axes
from lorac.ir.calls.row_layout import RowLayout, count_along

_SEQUENCES = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"})
_DECODER = "decoder_"
_SAMPLES = "input_values"
_TABLE = 2
"""Axes of token ids: rows, and the sequence along each."""
_BATCH, _PACKED = "batch", "packed"
"""Sizes: the number of rows, and that of items that lie one after another for all rows."""


def make_dynamic_shapes(model: nn.Module, inputs: Inputs, *, named: bool = True) -> dict[str, object]:
    """Return dynamic shapes for the batch of every tensor, the length of sequences and sounds, and sides of latents.

    Rows of token ids are the batch. An input with several items for each of them, such as the patches of all images one
    after another, has a size that torch is to narrow.

    Args:
        model: bounds the length where positions come from a table.
        inputs: the example inputs by name; the result is nested as they are.
        named: ``Dim``s called batch, length and decoder_length; else ``Dim.AUTO``, which lets torch narrow them.
    """
    leaves = pytree.tree_leaves_with_path(dict(inputs))
    tensors = [value for _, value in leaves if isinstance(value, Tensor) and value.dim()]
    language_model = next((module for module in model.modules() if is_hugging_face(module)), None)
    sequences = _SequenceAxes(language_model, {_name_leaf(path): value for path, value in leaves})
    dims = _NamedDims(named, _position_limit(language_model))
    batch = sequences.rows if sequences.rows is not None else tensors[0].shape[0] if tensors else None

    def axes(path: pytree.KeyPath, value: object) -> dict[int, object] | None:
        if not isinstance(value, Tensor):
            return None
        name = _name_leaf(path)
        along = sequences.axes(name, value) | list_image_axes(model, name, value)
        if name == _SAMPLES and value.dim() == _TABLE:
            along[1] = "samples"
        return {axis: dims[dim] for axis, dim in (rows(value, along) | along).items()}

    def rows(value: Tensor, along: Mapping[int, str]) -> dict[int, str]:
        if not value.dim() or not batch or _BATCH in along.values():
            return {}
        packed = sequences.rows is not None and value.shape[0] % batch == 0
        return {0: _BATCH} if value.shape[0] == batch else {0: _PACKED} if packed else {}

    shapes: dict[str, object] = pytree.tree_map_with_path(axes, dict(inputs))
    return shapes


def _name_leaf(path: pytree.KeyPath) -> str:
    """Return the name of an input, or of a tensor in a dict; tensors in a list have the list's name."""
    return next(str(key.key) for key in reversed(path) if isinstance(key, pytree.MappingKey))


class _NamedDims(dict[str, object]):
    """``Dim``s by name, made on first use.

    Args:
        named: whether they have names, so that torch must keep them.
        limit: the longest sequence.
    """

    def __init__(self, named: bool, limit: int | None) -> None:
        self._named, self._limit = named, limit

    def __missing__(self, name: str) -> object:
        limit = None if name == _BATCH else self._limit
        # Strided windows over samples restrict their number; a number of patches per row restricts the patches', and
        # blocks that halve an image its sides.
        named = self._named and name not in {"samples", _PACKED, *IMAGE_AXES}
        self[name] = dim = Dim(name, max=limit) if named else Dim.AUTO
        return dim


class _SequenceAxes:
    """The axes of a transformers model's inputs that run along its token sequences.

    Args:
        model: the model, or the one that it wraps; models of other libraries have no sequences.
        inputs: the example inputs by name.
    """

    def __init__(self, model: nn.Module | None, inputs: Inputs) -> None:
        self._known = model is not None
        self._ids = {name: value for name, value in inputs.items() if _without_decoder(name) == "input_ids"}

    @property
    def rows(self) -> int | None:
        """The number of sequences; None where the model has none."""
        tables = [ids for ids in self._ids.values() if isinstance(ids, Tensor) and ids.dim() == _TABLE]
        return tables[0].shape[0] if self._known and tables else None

    def axes(self, name: str, value: Tensor) -> dict[int, str]:
        """Return axis -> name of its ``Dim``.

        An input runs along the sequence if its name says so, or if it holds one or several integers per token.
        """
        plain = _without_decoder(name)
        dim = "length" if plain == name else f"{_DECODER}length"
        ids = self._ids.get(name.replace(plain, "input_ids"))
        if not self._known or value.dim() < _TABLE:
            return {}
        if isinstance(ids, Tensor) and not value.is_floating_point():
            if value.dim() > _TABLE and value.shape[-_TABLE:] == ids.shape:
                return {value.dim() - _TABLE: _BATCH, value.dim() - 1: dim}
            if value.shape[:_TABLE] == ids.shape:
                return {1: dim}
        return {1: dim} if plain in _SEQUENCES else {}


def _without_decoder(name: str) -> str:
    """Return an argument's name without the prefix that distinguishes a decoder's from an encoder's."""
    return name.removeprefix(_DECODER)


def _position_limit(model: nn.Module | None) -> int | None:
    """Return the longest sequence that a table of positions admits; None where positions are computed (rotary)."""
    if model is None or not is_hugging_face(model):
        return None
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    named = (m for path, m in model.named_modules() if re.search(r"(^|\.)(wpe|\w*position\w*)$", path))
    tensors = (
        tensor
        for module in named
        for tensor in itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))
    )
    return limit if any(tensor.dim() == _TABLE and tensor.is_floating_point() for tensor in tensors) else None


def let_narrow(shapes: object) -> object:
    """Return dynamic shapes that torch may restrict further, but not fix: each ``Dim`` with a name becomes a hint.

    torch refuses a named ``Dim`` for every size that it excludes, such as 1, whether or not the model does.
    """
    return pytree.tree_map_only(Dim, lambda dim: Dim.DYNAMIC, shapes)


def fix_hinted_axes(shapes: object) -> object:
    """Return dynamic shapes in which ``Dim.AUTO`` leaves only first axes free, which are the batch."""

    def fix(path: pytree.KeyPath, dim: object) -> object:
        axis = getattr(path[-1], "key", getattr(path[-1], "idx", 0)) if path else 0
        return Dim.STATIC if axis and dim == Dim.AUTO else dim

    return pytree.tree_map_with_path(fix, shapes)


def list_dynamic_axes(axes: object) -> list[int]:
    """Return the axes of a tensor that its dynamic shapes leave free.

    Args:
        axes: as torch.export takes them: ``Dim``s or hints by axis, or in order; None for a fixed axis.
    """
    pairs = axes.items() if isinstance(axes, Mapping) else enumerate(axes) if isinstance(axes, list | tuple) else ()
    return [axis for axis, dim in pairs if dim is not None and not isinstance(dim, int) and dim != Dim.STATIC]


def repeat_unit_axes(value: Any, axes: Any) -> Any:
    """Repeat each dynamic axis of size 1 once, since torch.export treats a size of 1 as a constant.

    Args:
        value: a tensor, or tensors in dicts, lists and tuples.
        axes: its dynamic shapes, nested alike.
    """
    if isinstance(value, Mapping) and isinstance(axes, Mapping):
        return type(value)({name: repeat_unit_axes(inner, axes.get(name)) for name, inner in value.items()})  # type: ignore[call-arg]  # a dict
    if type(value) in {list, tuple} and isinstance(axes, list | tuple):
        return type(value)(repeat_unit_axes(inner, own) for inner, own in zip(value, axes, strict=False))
    if not isinstance(value, Tensor):
        return value
    unit = [axis for axis in list_dynamic_axes(axes) if value.shape[axis] == 1]
    return value.repeat([2 if axis in unit else 1 for axis in range(value.dim())]) if unit else value


def repeat_unit_axes_of_inputs(model: nn.Module, inputs: object, dynamic_shapes: object) -> object:
    """Return inputs, in order or by name, after ``repeat_unit_axes`` for each of them."""
    shapes = bind_arguments(model, dynamic_shapes)
    values = {name: repeat_unit_axes(value, shapes.get(name)) for name, value in bind_arguments(model, inputs).items()}
    if isinstance(inputs, Mapping):
        return values
    return inspect.BoundArguments(inspect.signature(model.forward), OrderedDict(values)).args


def find_row_layout(model: nn.Module, inputs: Inputs, constants: Inputs) -> RowLayout | None:
    """Return where the rows of an example call lie; None where no input has any.

    Args:
        inputs: the captured inputs by name.
        constants: arguments that the program holds.
    """
    named = {name: _batch_axis(axes) for name, axes in make_dynamic_shapes(model, inputs).items()}
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


def _batch_axis(axes: object) -> int | None:
    """Return the axis of the batch among an input's dynamic axes."""
    named = axes.items() if isinstance(axes, Mapping) else ()
    return next((axis for axis, dim in named if getattr(dim, "__name__", "") == _BATCH), None)
