"""Files with names that only diffusers' converters can map: Wan, Hunyuan, Qwen, LTX and others.

A converter may silently drop tensors that it does not know. So every tensor of the file must reach the converter's
result, which autograd shows, and every tensor of one number must reach it or be read as a Python number. The converted
names are then looked up in the model, as the names of any file are.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorac.errors import FormatError
from lorac.formats._image_files.layout import unused_tensor
from lorac.formats._image_files.places import PipelineModel, choose_component, list_pipeline
from lorac.formats._image_files.spellings import COMPONENTS, parse_name
from lorac.frontend.model_view import ModelView

_LIBRARY = "diffusers"
_FAMILIES = {
    "AnyFlow": "Wan",
    "AnyFlowFAR": "Wan",
    "BriaFibo": "Flux",
    "Chroma": "Flux",
    "ChronoEdit": "Wan",
    "ConsisID": "CogVideoX",
    "HunyuanVideoFramepack": "HunyuanVideo",
    "Kandinsky5": "Kandinsky",
    "LTX2Video": "LTX2",
    "Mochi": "Mochi1",
    "QwenImage21": "QwenImage",
    "SanaVideo": "Sana",
    "WanAnimate": "Wan",
    "WanVACE": "Wan",
}
"""Name of a transformer class, without ``Transformer…`` -> name of its pipelines' LoRA loader, where they differ."""
Converter = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]
_READS = frozenset({"item", "tolist", "__float__", "__int__"})


class WatchedNumber(Tensor):
    """A tensor of one number that records its conversion to a Python number, which autograd does not record."""

    was_read: bool

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call a function of torch, and record whether it reads the number."""
        if getattr(function, "__name__", "") in _READS and isinstance(args[0], WatchedNumber):
            args[0].was_read = True
        return super().__torch_function__(function, types, args, kwargs or {})  # type: ignore[no-untyped-call]  # torch's


def convert_names(path: Path, tensors: Mapping[str, Tensor], view: ModelView) -> Mapping[str, Tensor]:
    """Convert the names in a file to the models' names; return the tensors unchanged if the file has these already.

    Raises:
        FormatError: diffusers' converter for the model drops a tensor, or raises.
    """
    pipeline = list_pipeline(view)
    unknown = _find_unknown(tensors, view, pipeline)
    convert = next((found for one in pipeline.values() if (found := _find_converter(one.model))), None)
    if not unknown or convert is None:
        return tensors
    try:
        converted = convert(dict(tensors))
        dropped = find_dropped(convert, tensors) if converted.keys() != tensors.keys() else []
    except Exception as error:  # a converter may raise any exception on names that it does not expect
        raise FormatError(
            f"'{path}' has names such as '{unknown[0]}', and diffusers' converter for the model fails on it: "
            f"{type(error).__name__}: {error}",
            next_step="load the class of model that the adapter was trained on",
        ) from error
    if dropped:
        raise unused_tensor(f"'{path}'", dropped[0], "and diffusers' converter for the model leaves it out")
    # Where the converter's names match no layers either, the file's own names are returned, for the error to quote.
    return tensors if _find_unknown(converted, view, pipeline) else converted


def _find_unknown(names: Iterable[str], view: ModelView, pipeline: Mapping[str, PipelineModel]) -> list[str]:
    """Return the names that match no layer of any model."""
    beginnings = {*COMPONENTS, *(f"{component}." for component in pipeline)}

    def is_known(key: str) -> bool:
        name = parse_name(key, beginnings)
        component = None if name is None else choose_component(name.component, pipeline)
        return name is not None and component is not None and component.knows(name, view.sites)

    return [key for key in names if not is_known(key)]


def _find_converter(model: nn.Module) -> Converter | None:
    """Return diffusers' converter from a file's names to a model's; None for classes without a converter."""
    if type(model).__module__.partition(".")[0] != _LIBRARY:
        return None
    mixin = getattr(importlib.import_module(f"{_LIBRARY}.loaders"), name_loader(type(model).__name__), None)
    if mixin is None:
        return None

    def convert(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        answer = mixin.lora_state_dict(tensors)
        converted, alphas = answer if isinstance(answer, tuple) else (answer, None)  # some return alphas separately
        return {**converted, **{name: torch.as_tensor(alpha) for name, alpha in (alphas or {}).items()}}

    return convert


def name_loader(model: str) -> str:
    """Return the name of the diffusers class that loads LoRAs for a transformer class."""
    stem = model.partition("Transformer")[0]
    return f"{_FAMILIES.get(stem, stem)}LoraLoaderMixin"


def find_dropped(convert: Converter, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors that do not affect a converter's result."""
    with torch.enable_grad():
        leaves = {name: tensor.detach().clone().float().requires_grad_() for name, tensor in tensors.items()}
        copies = {name: leaf.clone() for name, leaf in leaves.items()}
        given = {name: one.as_subclass(WatchedNumber) if one.numel() == 1 else one for name, one in copies.items()}
        returned = [tensor.sum() for tensor in convert(dict(given)).values() if tensor.requires_grad]
        reached = torch.autograd.grad(returned, list(leaves.values()), allow_unused=True) if returned else ()
    found = dict(zip(leaves, reached or [None] * len(leaves), strict=True))
    return [
        name for name, gradient in found.items() if gradient is None and not getattr(given[name], "was_read", False)
    ]
