"""Example inputs and dynamic shapes for a capture, made from a model's main input and its configuration."""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lorac.errors import ExampleInputsNeeded
from lorac.frontend.image_tokens import PIXEL_VALUES, get_image_token, insert_image_tokens

Inputs = Mapping[str, Any]

_BATCH, _LENGTH, _DECODER_LENGTH = 2, 7, 5  # never 0 or 1, which torch.export takes for constants; distinct primes
_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"})
_DECODER = "decoder_"
_TABLE = 2
"""Axes of ids: rows, and the text along each."""
OUTPUT_SWITCHES = ("return_dict", "output_hidden_states", "output_attentions")
"""Arguments of transformers models that their configuration has too."""
CAPTURE_CONFIG = {"use_cache": False}
"""What a capture sets in the configuration of a transformers model: its graph keeps no cache."""
TRACE_CONFIG = CAPTURE_CONFIG | {"_experts_implementation": "batched_mm"}
"""What only its trace sets besides: products that have an op everywhere, in place of kernels for groups of tokens."""


def is_hugging_face(model: nn.Module) -> bool:
    """Whether ``model`` is a transformers model; does not import transformers."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def make_example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Example inputs from the model's main input and configuration.

    Raises:
        ExampleInputsNeeded: neither text, pixels nor sound, or a model that joins them otherwise than by one id for
            each piece of an image.
    """
    config, names = getattr(model, "config", None), list(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", None) if is_hugging_face(model) else None
    inputs: dict[str, Tensor] = {}
    if main in ("input_ids", *_SEEN, *_HEARD) and main in names:
        device = next((p.device for p in model.parameters()), None)
        if main == "input_ids":
            inputs |= _text_inputs(config, names, device)
        shapes = {name: _seen(config, name) for name in _SEEN if name in names}
        shapes |= {name: _HEARD[name](config) for name in _HEARD if name == main}
        inputs |= {name: _wave(model, shape, device) for name, shape in shapes.items() if shape is not None}
        if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = _ids(config, _DECODER_LENGTH, device)
    token = get_image_token(config)
    if token is not None and main == "input_ids":
        inputs = _joined(model, inputs, token)
    if main not in inputs:
        raise ExampleInputsNeeded(
            f"example inputs cannot be made for {type(model).__name__}; its forward takes ({', '.join(names)})",
            next_step=f"{_ready_made(model, names)}, batch and lengths of 2 or more",
        )
    return inputs


def _joined(model: nn.Module, inputs: dict[str, Tensor], token: int) -> dict[str, Tensor]:
    """Inputs with placeholders for the images among the ids; nothing where they cannot be made to fit."""
    found = (
        insert_image_tokens(model, inputs["input_ids"], inputs[PIXEL_VALUES], token) if PIXEL_VALUES in inputs else None
    )
    if found is None:
        return {}
    mask = "attention_mask"
    return {**inputs, **found} | ({mask: torch.ones_like(found["input_ids"])} if mask in inputs else {})


def _ready_made(model: nn.Module, names: Collection[str]) -> str:
    """How to make example inputs, to be copied: by the processor of a transformers model, else one tensor a name."""
    if is_hugging_face(model):
        given = {"images": [PIXEL_VALUES, _MOVING], "audio": list(_HEARD), "text": ["input_ids"]}
        kinds = [kind for kind, taken in given.items() if set(taken) & set(names)]
        path = getattr(model.config, "name_or_path", "") or "the model's name"
        made = ", ".join(f"{kind}=[..., ...]" for kind in kinds)
        processor = f"transformers.AutoProcessor.from_pretrained({path!r})"
        return f"pass example_inputs=dict({processor}({made}, return_tensors='pt', padding=True))"
    parameters = inspect.signature(model.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD] or names
    made = ", ".join(f"{name!r}: torch.randn(2, ...)" for name in needed)
    return f"pass example_inputs={{{made}}}, with the shapes that the model takes"


def _text_inputs(config: Any, names: Collection[str], device: Any) -> dict[str, Tensor]:
    ids = _ids(config, _LENGTH, device)
    return {"input_ids": ids} | ({"attention_mask": torch.ones_like(ids)} if "attention_mask" in names else {})


def _ids(config: Any, length: int, device: Any) -> Tensor:
    """Distinct-looking token ids without a random generator; the last is the end of the text (CLIP looks for it)."""
    text = config.get_text_config(decoder=True)
    ids: Tensor = (torch.arange(_BATCH * length, device=device).reshape(_BATCH, length) * 5 + 3) % text.vocab_size
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < text.vocab_size:
        ids[:, -1] = end
    return ids


def _seen(config: Any, name: str) -> tuple[int, ...] | None:
    """The shape of images of the configured size, or of so many moments of them; None where none is configured."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else (tuple(size or ()) or (None, None))
    if height is None:
        return None
    frames = getattr(vision, "num_frames", getattr(vision, "frames_per_clip", None))
    if frames is None and name == _MOVING:
        return None
    return (_BATCH, *(() if frames is None else (frames,)), getattr(vision, "num_channels", 3), height, width)


def _samples(config: Any) -> tuple[int, ...] | None:
    """The shape of a sound: samples that a stack of convolutions makes frames of, or a spectrogram of a fixed size."""
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if kernels and strides:
        count = _LENGTH
        for kernel, stride in reversed(list(zip(kernels, strides, strict=False))):
            count = (count - 1) * stride + kernel
        return (_BATCH, count)
    return _sized(config, "max_length", "num_mel_bins")


def _spectrum(config: Any) -> tuple[int, ...] | None:
    """The shape of a spectrogram with time last, two moments for each position of the encoder."""
    found = _sized(config, "num_mel_bins", "max_source_positions")
    return None if found is None else (*found[:2], 2 * found[2])


def _sized(config: Any, *names: str) -> tuple[int, ...] | None:
    sizes = [getattr(config, name, None) for name in names]
    return None if None in sizes else (_BATCH, *(size for size in sizes if size is not None))


def _wave(model: nn.Module, shape: tuple[int, ...], device: Any) -> Tensor:
    """Values from -1 to 1 without a random generator, in the model's precision."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    count = torch.Size(shape).numel()
    return (torch.arange(count, device=device).remainder(255) / 127.5 - 1).reshape(shape).to(dtype)


_MOVING = "pixel_values_videos"
_SEEN = (PIXEL_VALUES, _MOVING)
"""Arguments that hold images."""
_SAMPLES = "input_values"
_HEARD: Mapping[str, Callable[[Any], tuple[int, ...] | None]] = {_SAMPLES: _samples, "input_features": _spectrum}
"""Arguments that hold sounds -> their shapes."""


def make_dynamic_shapes(model: nn.Module, inputs: Inputs, *, named: bool = True) -> dict[str, Any]:
    """Dynamic shapes: the batch of every tensor input, the length of texts and of sounds; nested as the inputs are.

    Rows of text are the batch. What has several places for each of them, such as the pieces of all images one after
    another, has a size that torch is to narrow.

    Args:
        model: bounds the length where positions come from a table.
        inputs: the example inputs, by name.
        named: ``Dim``s called batch, length and decoder_length; else ``Dim.AUTO``, which lets torch narrow them.
    """
    tensors = [value for value in inputs.values() if isinstance(value, Tensor) and value.dim()]
    texts = _SequenceAxes(model, inputs)
    dims = _NamedDims(named, _position_limit(model))
    batch = texts.rows if texts.rows is not None else tensors[0].shape[0] if tensors else None

    def axes(name: str, value: Any) -> dict[int, Any] | None:
        if not isinstance(value, Tensor):
            return None
        along = texts.axes(name, value)
        if name == _SAMPLES and value.dim() == _TABLE:
            along[1] = "samples"
        return {axis: dims[dim] for axis, dim in (_rows(value, along) | along).items()}

    def _rows(value: Tensor, along: Mapping[int, str]) -> dict[int, str]:
        if not value.dim() or not batch or "batch" in along.values():
            return {}
        packed = texts.rows is not None and value.shape[0] % batch == 0
        return {0: "batch"} if value.shape[0] == batch else {0: _PACKED} if packed else {}

    return {name: pytree.tree_map(functools.partial(axes, name), value) for name, value in inputs.items()}


_PACKED = "packed"
"""The size of what lies one after another for all rows."""


class _NamedDims(dict[str, Any]):
    """``Dim``s by name, made when they are asked for.

    Args:
        named: whether they have names, so that torch must keep them.
        limit: the longest text.
    """

    def __init__(self, named: bool, limit: int | None) -> None:
        self._named, self._limit = named, limit

    def __missing__(self, name: str) -> Any:
        limit = None if name == "batch" else self._limit
        # Steps over samples leave no such size quite free, and how many pieces a row has none of pieces.
        named = self._named and name not in {"samples", _PACKED}
        self[name] = found = Dim(name, max=limit) if named else Dim.AUTO
        return found


class _SequenceAxes:
    """Which axes of a transformers model's inputs run along its text.

    Args:
        model: any model; others than transformers' have no text.
        inputs: the example inputs, by name.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self._known = is_hugging_face(model)
        self._ids = {name: value for name, value in inputs.items() if _plain(name) == "input_ids"}

    @property
    def rows(self) -> int | None:
        """How many texts there are; None where the model has none."""
        tables = [ids for ids in self._ids.values() if isinstance(ids, Tensor) and ids.dim() == _TABLE]
        return tables[0].shape[0] if self._known and tables else None

    def axes(self, name: str, value: Tensor) -> dict[int, str]:
        """Axis -> what its ``Dim`` is called.

        What is known by its name is text, and so are whole numbers that come one, or several, to a token.
        """
        text = _plain(name)
        dim = "length" if text == name else f"{_DECODER}length"
        ids = self._ids.get(name.replace(text, "input_ids"))
        if not self._known or value.dim() < _TABLE:
            return {}
        whole = ids is not None and not value.is_floating_point()
        if whole and value.dim() > _TABLE and value.shape[-_TABLE:] == ids.shape:  # type: ignore[union-attr]  # it is there
            return {value.dim() - _TABLE: "batch", value.dim() - 1: dim}
        return {1: dim} if text in _TEXT or (whole and value.shape[:_TABLE] == ids.shape) else {}  # type: ignore[union-attr]  # see above


def _plain(name: str) -> str:
    """An argument's name, without what tells a decoder's from an encoder's."""
    return name.removeprefix(_DECODER)


def _position_limit(model: nn.Module) -> int | None:
    """The longest text a table of positions admits; None where positions are computed (rotary, relative)."""
    config = getattr(model, "config", None)
    if config is None or not is_hugging_face(model):
        return None
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    tables = (path for path, module in model.named_modules() if any(map(_is_table, _own_tensors(module))))
    return limit if any(re.search(r"(^|\.)(wpe|\w*position\w*)$", path) for path in tables) else None


def _own_tensors(module: nn.Module) -> Iterable[Tensor]:
    """The tensors that a module holds itself: learned, or computed once as sines are."""
    return itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))


def _is_table(tensor: Tensor) -> bool:
    return tensor.dim() == _TABLE and tensor.is_floating_point()


def list_dynamic_axes(axes: Any) -> list[int]:
    """The axes of a tensor that dynamic shapes want to vary.

    Args:
        axes: what torch.export takes for a tensor: ``Dim``s or hints by axis, or in order; None for one that is fixed.
    """
    pairs = axes.items() if isinstance(axes, Mapping) else enumerate(axes) if isinstance(axes, list | tuple) else ()
    return [axis for axis, dim in pairs if dim is not None and not isinstance(dim, int) and dim != Dim.STATIC]


def repeat_unit_axes(value: Any, axes: Any) -> Any:
    """``value`` with each dynamic axis of size 1 repeated once, since torch.export takes a size of 1 for a constant.

    Args:
        value: a tensor, or several in dicts, lists and tuples.
        axes: its dynamic shapes, nested alike.
    """
    if isinstance(value, Mapping) and isinstance(axes, Mapping):
        return type(value)({name: repeat_unit_axes(inner, axes.get(name)) for name, inner in value.items()})  # type: ignore[call-arg]  # a dict
    if type(value) in {list, tuple} and isinstance(axes, list | tuple):
        return type(value)(repeat_unit_axes(inner, own) for inner, own in zip(value, axes, strict=False))
    if not isinstance(value, Tensor):
        return value
    wide = [axis for axis in list_dynamic_axes(axes) if value.shape[axis] == 1]
    return value.repeat([2 if axis in wide else 1 for axis in range(value.dim())]) if wide else value


def repeat_unit_axes_of_inputs(model: nn.Module, inputs: Any, dynamic_shapes: Any) -> Any:
    """Inputs, in order or by name, with each axis of size 1 that dynamic shapes want to vary repeated once."""
    shapes = _bind_arguments(model, dynamic_shapes)
    values = {name: repeat_unit_axes(value, shapes.get(name)) for name, value in _bind_arguments(model, inputs).items()}
    if isinstance(inputs, Mapping):
        return values
    return inspect.BoundArguments(inspect.signature(model.forward), OrderedDict(values)).args


def convert_to_tensors(given: Any) -> Any:
    """Example inputs as torch has them: a lone tensor is a tuple of one, and arrays of NumPy's become tensors."""
    if isinstance(given, Tensor | np.ndarray):
        return (convert_to_tensor(given),)
    if isinstance(given, Mapping):
        return {name: _inner(value) for name, value in given.items()}
    return tuple(map(_inner, given)) if type(given) in {list, tuple} else given


def _inner(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _inner(own) for name, own in value.items()}
    return type(value)(map(_inner, value)) if type(value) in {list, tuple} else convert_to_tensor(value)


def convert_to_tensor(value: Any) -> Any:
    """An array of numbers as a tensor of its own memory; anything else as it is."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "biufc":
        return value
    return torch.from_numpy(value.copy())


def bind_by_name(model: nn.Module, given: Any) -> dict[str, Any]:
    """Inputs as a dict: a tuple is bound to the names of forward, and what is None is left out."""
    return {name: value for name, value in _bind_arguments(model, given).items() if value is not None}


def _bind_arguments(model: nn.Module, given: Any) -> dict[str, Any]:
    return dict(given if isinstance(given, Mapping) else inspect.signature(model.forward).bind(*given).arguments)


def list_positional_arguments(model: nn.Module, inputs: Collection[str]) -> tuple[str, ...]:
    """Names of forward's arguments in the order of a positional call.

    Args:
        model: the host.
        inputs: inputs of its captured program; those of a ``*args`` are called ``args_0``, ``args_1``, ...
    """
    names: list[str] = []
    for name, parameter in inspect.signature(model.forward).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [found for found in inputs if re.fullmatch(rf"{name}_\d+", found)]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(name)
    return tuple(names)


def set_config_fields(model: nn.Module, fields: Mapping[str, Any] = CAPTURE_CONFIG) -> None:
    """Set a copy of a transformers model to what a capture captures, in the configurations that are the copy's own.

    Args:
        model: the copy.
        fields: by name, what is set wherever a configuration has it.
    """
    configs = (getattr(module, "config", None) for module in model.modules()) if is_hugging_face(model) else ()
    for config, (name, value) in itertools.product(configs, fields.items()):
        if hasattr(config, name):
            setattr(config, name, value)


def list_fixed_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments of forward that are no tensors, and the values a capture gives them: their defaults."""
    parameters = inspect.signature(model.forward).parameters
    found = {name: p.default for name, p in parameters.items() if isinstance(p.default, bool | int | float | str)}
    if is_hugging_face(model):  # there None means what the configuration says
        switches: Any = model.config
        found |= {name: getattr(switches, name) for name in OUTPUT_SWITCHES if hasattr(switches, name)} | CAPTURE_CONFIG
    return found
