"""Models of diffusers, recognised without importing it: example inputs from the configuration, and varying axes.

An argument name has the same meaning in all models, so that each name has one row in a table.
"""

import sys
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorac.argument_types import JsonMapping
from lorac.frontend.host import Host, describe_tensors
from lorac.ir.calls.call import Inputs

_ROWS, _TOKENS, _FRAMES, _PATCHES = 2, 7, 4, (2, 3)
_TIME_IDS = 6
"""Number of sizes and crops with which Stable Diffusion XL is conditioned."""

Shape = tuple[int, ...]

_IMAGE, _VIDEO = {2: "height", 3: "width"}, {2: "frames", 3: "height", 4: "width"}
_AXES: Mapping[tuple[str, int], Mapping[int, str]] = {
    **{(name, 2 + len(axes)): axes for name in ("sample", "hidden_states", "z", "x") for axes in (_IMAGE, _VIDEO)},
    ("hidden_states", 3): {1: "patches"},
    ("img_ids", 2): {0: "patches"},
    ("encoder_hidden_states", 3): {1: "tokens"},
    ("txt_ids", 2): {0: "tokens"},
}
"""Argument and its number of axes -> the varying axes besides the rows, with names."""


class DiffusersHost(Host):
    """A model of diffusers."""

    named_sizes = (False,)  # models restrict rows (upsampling tests for 64), which torch refuses for a named size
    row_numbers = ("timestep",)  # schedulers pass one number for all rows, an int or a float
    free_sizes = frozenset({"frames", "height", "width", "patches", "tokens"})

    @classmethod
    def recognises(cls, model: nn.Module) -> bool:
        library = sys.modules.get("diffusers.models.modeling_utils")
        return library is not None and isinstance(model, library.ModelMixin)

    def example_inputs(self) -> dict[str, object]:
        """Make inputs from the model's configuration."""
        given = getattr(self.model, "config", None)
        config = given if isinstance(given, Mapping) and not any(given.get(name) for name in _UNKNOWN) else {}
        shapes = {name: _SHAPES[name](config) for name in self.parameters if name in _SHAPES} if config else {}
        inputs = {name: self._make(shape) for name, shape in shapes.items() if shape is not None}
        needed = {n for n, p in self.parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
        if not inputs or not needed <= inputs.keys():
            raise self.require_inputs(describe_tensors(self.parameters))
        return inputs

    def _make(self, shape: Shape | Mapping[str, Shape]) -> object:
        if isinstance(shape, Mapping):
            return {name: self._make(inner) for name, inner in shape.items()}
        if shape == (_ROWS,):  # one time or strength per row
            return torch.linspace(0.25, 0.75, _ROWS, device=self.device)
        if len(shape) == 2 + len(_IMAGE) and any(isinstance(module, nn.Conv3d) for module in self.model.modules()):
            shape = (*shape[:2], _FRAMES, *shape[2:])
        return self.make_wave(shape)

    def axes(self, name: str, value: Tensor, inputs: Inputs) -> dict[int, str]:
        """Name the axes of pixels, patches or tokens."""
        return dict(_AXES.get((name, value.dim()), {}))

    def decoder(self) -> nn.Module:
        cls = type(self.model)
        decode = getattr(cls, "decode", None)
        if decode is None:
            return self.model
        copied = self.copy().model
        copied.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, "forward": decode})
        return copied


HOST = DiffusersHost


_UNKNOWN = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type")
"""Fields of configurations that require arguments whose shapes the configuration does not determine."""


def _size(config: JsonMapping, names: Collection[str]) -> int | None:
    """Return the first of these fields that is set; for a field with one value per block, the first block's."""
    found = next((config[name] for name in names if config.get(name) is not None), None)
    return found if found is None or isinstance(found, int) else int(found[0])


def _image(config: JsonMapping) -> Shape | None:
    """Return the shape of images or latents whose sides a model halves, or divides into patches."""
    channels, blocks, patch = (config.get(name) for name in ("in_channels", "block_out_channels", "patch_size"))
    side = max(patch) if isinstance(patch, Sequence) else patch  # sizes of frames, rows and columns
    factor = 2 ** (len(blocks) - 1) if blocks else side
    return (_ROWS, channels, *(factor * size for size in _PATCHES)) if channels and factor else None


def _latents_or_patches(config: JsonMapping) -> Shape | None:
    if "sample_size" in config or isinstance(config.get("patch_size"), Sequence):
        return _image(config)
    channels = config.get("in_channels")
    return (_ROWS, _PATCHES[0] * _PATCHES[1], channels) if channels else None


def _vectors(*names: str, items: Shape = ()) -> Callable[[JsonMapping], Shape | None]:
    """Return a function for the shape of one or more vectors per row; the first field that is set is the width."""

    def shape(config: JsonMapping) -> Shape | None:
        size = _size(config, names)
        return (_ROWS, *items, size) if size else None

    return shape


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
    "z": lambda config: (_ROWS, z, *_PATCHES) if (z := _size(config, ("latent_channels", "z_dim"))) else None,
    "timestep": lambda config: (_ROWS,),
    "encoder_hidden_states": _vectors(
        "joint_attention_dim", "cross_attention_dim", "caption_channels", "text_dim", items=(_TOKENS,)
    ),
    "pooled_projections": _vectors("pooled_projection_dim"),
    "img_ids": _positions(_PATCHES[0] * _PATCHES[1]),
    "txt_ids": _positions(_TOKENS),
    "guidance": lambda config: (_ROWS,) if config.get("guidance_embeds") else None,
    "timestep_cond": _vectors("time_cond_proj_dim"),
    "added_cond_kwargs": _text_and_time,
}
"""Argument of forward -> function (config) -> its shape, or None if the model does not need the argument."""
