"""Models of diffusers, recognised without importing it: example inputs by their configurations, and the free axes.

An argument of one name holds the same in all of them, so each has one row in a table.
"""

import inspect
import sys
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from lorac.argument_types import JsonMapping
from lorac.frontend.inputs.call_binding import bind_arguments, bind_by_name
from lorac.ir.calls.call import Call
from lorac.ir.calls.call_values import ROW_NUMBERS, spread_over_rows

_ROWS, _TOKENS, _PATCHES = 2, 7, (2, 3)
_TIME_IDS = 6
"""Sizes and crops that Stable Diffusion XL is conditioned on."""

Shape = tuple[int, ...]


def is_diffusers(model: nn.Module) -> bool:
    """Return whether ``model`` is a model of diffusers; does not import diffusers."""
    library = sys.modules.get("diffusers.models.modeling_utils")
    return library is not None and isinstance(model, library.ModelMixin)


_IMAGE = {2: "height", 3: "width"}
_AXES: Mapping[tuple[str, int], Mapping[int, str]] = {
    **{(name, 4): _IMAGE for name in ("sample", "hidden_states", "z", "x")},
    ("hidden_states", 3): {1: "patches"},
    ("img_ids", 2): {0: "patches"},
    ("encoder_hidden_states", 3): {1: "tokens"},
    ("txt_ids", 2): {0: "tokens"},
}
"""Argument and its number of axes -> the axes that vary beside the rows, by name."""
IMAGE_AXES = frozenset(axis for axes in _AXES.values() for axis in axes.values())


def list_image_axes(model: nn.Module, name: str, value: Tensor) -> dict[int, str]:
    """Return the axes of an input of a diffusers model along which pixels, patches or tokens lie."""
    return dict(_AXES.get((name, value.dim()), {})) if is_diffusers(model) else {}


def spread_example_numbers(model: nn.Module, inputs: object, shapes: object) -> tuple[object, object]:
    """Return the example inputs and dynamic shapes of a diffusers model with one timestep for each row, as a float.

    A program is then called with whatever a scheduler gives: one number for all rows, of any dtype.
    """
    named = bind_by_name(model, inputs) if is_diffusers(model) and inputs is not None else {}
    rows_of = next((name for name, value in named.items() if isinstance(value, Tensor) and value.dim() > 1), None)
    numbers = [name for name in ROW_NUMBERS if name in named and torch.as_tensor(named[name]).dim() < 2]
    if rows_of is None or not numbers:
        return inputs, shapes
    spread = spread_over_rows(named, dict.fromkeys(numbers, rows_of))
    if shapes is None:
        return spread, None
    given = bind_arguments(model, shapes)
    axes = given.get(rows_of)
    first = axes.get(0) if isinstance(axes, Mapping) else axes[0] if axes else None
    return spread, {**given, **{name: {0: first} for name in numbers}}


def find_row_numbers(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the inputs of a diffusers model with one number per row -> an input with as many rows.

    Args:
        values: input -> a tensor of its shape, which may have symbols for sizes.
    """
    numbers = (
        [name for name in ROW_NUMBERS if name in values and values[name].dim() == 1] if is_diffusers(model) else []
    )
    found: dict[str, str] = {}
    for name in numbers:
        size = str(values[name].shape[0])
        alike = [other for other, value in values.items() if value.dim() > 1 and str(value.shape[0]) == size]
        found |= {name: alike[0]} if alike else {}
    return found


def list_row_numbers(model: nn.Module, call: Call) -> list[object]:
    """Return the arguments of a call of a diffusers model that are one number per row, or one for all rows."""
    if not is_diffusers(model):
        return []
    named = {**dict(zip(inspect.signature(model.forward).parameters, call.args, strict=False)), **call.kwargs}
    return [named[name] for name in ROW_NUMBERS if name in named]


def make_image_inputs(model: nn.Module) -> dict[str, object]:
    """Make example inputs of a diffusers model from its configuration; none where that does not suffice."""
    config = getattr(model, "config", None)
    if not is_diffusers(model) or not isinstance(config, Mapping) or any(config.get(name) for name in _UNKNOWN):
        return {}
    parameters = inspect.signature(model.forward).parameters
    inputs = {name: _make(_SHAPES[name](config), model) for name in parameters if name in _SHAPES}
    made = {name: value for name, value in inputs.items() if value is not None}
    needed = {name for name, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    return made if needed <= made.keys() else {}


_UNKNOWN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
"""Fields of configurations that ask for arguments of which they do not give the shape."""


def _make(shape: Shape | Mapping[str, Shape] | None, model: nn.Module) -> object:
    if shape is None:
        return None
    if isinstance(shape, Mapping):
        return {name: _make(inner, model) for name, inner in shape.items()}
    if shape == (_ROWS,):  # a time or a strength for each row
        return torch.linspace(0.25, 0.75, _ROWS, device=next(model.parameters()).device)
    return make_wave(model, shape)


def make_wave(model: nn.Module, shape: Shape) -> Tensor:
    """Make values from -1 to 1 without a random generator, in the model's precision and on its device."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    device = next((p.device for p in model.parameters()), None)
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=device).remainder(255) / 127.5 - 1).reshape(shape).to(dtype)


def _size(config: JsonMapping, names: Collection[str]) -> int | None:
    """Return the first of several fields that is set; of one per block that of the first block."""
    found = next((config[name] for name in names if config.get(name) is not None), None)
    return found if found is None or isinstance(found, int) else int(found[0])


def _image(config: JsonMapping) -> Shape | None:
    """Return the shape of images or latents whose sides a model halves, or cuts into patches."""
    channels, blocks = config.get("in_channels"), config.get("block_out_channels")
    factor = 2 ** (len(blocks) - 1) if blocks else config.get("patch_size")
    return (_ROWS, channels, *(factor * size for size in _PATCHES)) if channels and factor else None


def _latents_or_patches(config: JsonMapping) -> Shape | None:
    if "sample_size" in config:
        return _image(config)
    channels = config.get("in_channels")
    return (_ROWS, _PATCHES[0] * _PATCHES[1], channels) if channels else None


def _vectors(*names: str, items: Shape = ()) -> Callable[[JsonMapping], Shape | None]:
    """Return the shape of one vector for each row, or of several, whose width the first field that is set gives."""

    def shape(config: JsonMapping) -> Shape | None:
        size = _size(config, names)
        return (_ROWS, *items, size) if size else None

    return shape


def _latents(config: JsonMapping) -> Shape | None:
    channels = config.get("latent_channels")
    return (_ROWS, channels, *_PATCHES) if channels else None


def _positions(count: int) -> Callable[[JsonMapping], Shape | None]:
    def shape(config: JsonMapping) -> Shape | None:
        axes = config.get("axes_dims_rope")
        return (count, len(axes)) if axes else None

    return shape


def _text_and_time(config: JsonMapping) -> dict[str, Shape] | None:
    width, size = config.get("projection_class_embeddings_input_dim"), config.get("addition_time_embed_dim")
    if config.get("addition_embed_type") != "text_time" or not width or not size:
        return None
    return {"text_embeds": (_ROWS, width - _TIME_IDS * size), "time_ids": (_ROWS, _TIME_IDS)}


_SHAPES: Mapping[str, Callable[[JsonMapping], Shape | Mapping[str, Shape] | None]] = {
    "sample": _image,
    "hidden_states": _latents_or_patches,
    "z": _latents,
    "timestep": lambda config: (_ROWS,),
    "encoder_hidden_states": _vectors(
        "joint_attention_dim", "cross_attention_dim", "caption_channels", items=(_TOKENS,)
    ),
    "pooled_projections": _vectors("pooled_projection_dim"),
    "img_ids": _positions(_PATCHES[0] * _PATCHES[1]),
    "txt_ids": _positions(_TOKENS),
    "guidance": lambda config: (_ROWS,) if config.get("guidance_embeds") else None,
    "timestep_cond": _vectors("time_cond_proj_dim"),
    "added_cond_kwargs": _text_and_time,
}
"""Argument of forward -> its shape by the configuration; None where the model does not need it."""
