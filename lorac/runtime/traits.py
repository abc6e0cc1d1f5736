"""Components: one of several models compiled together, called and asked as the model it stands for."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorac.frontend.components import list_components


class StoredConfig(dict[str, Any]):
    """A model's configuration as it was stored: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class CustomGeneration:
    """A way of generating that is not transformers' common one.

    Attributes:
        path: of the class that brings it: its module, a colon and its name.
        asks: what it reads of the model's modules, sizes of layers say: path of an attribute -> value.
    """

    path: str
    asks: Mapping[str, Any]


@dataclass(frozen=True)
class ModelTraits:
    """What others ask of a model besides calling it.

    Attributes:
        config: its configuration, or None.
        dtype: of its parameters: the first floating-point one's.
        device: where they are.
        generation: its generation configuration, as far as something is said in it; None where it does not generate.
        rules: the class that brings a ``generate`` of its own, if one does, and what that asks of the model's modules.
    """

    config: Any
    dtype: torch.dtype
    device: torch.device
    generation: Mapping[str, Any] | None = None
    rules: CustomGeneration | None = None

    @property
    def settings(self) -> Mapping[str, Any]:
        """Its configuration by name; where a part of it is about text, with what that says."""
        entries = _config_entries(self.config) or {}
        text = entries.get("text_config")
        return {**text, **entries} if isinstance(text, Mapping) else entries

    def to_json(self) -> dict[str, Any]:
        """The traits as JSON; of the configuration what JSON can hold."""
        return {
            "config": _json_values(_config_entries(self.config)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "generation": _json_values(self.generation),
            "rules": None if self.rules is None else _json_values(dataclasses.asdict(self.rules)),
        }


def collect_traits(model: nn.Module) -> dict[str, ModelTraits]:
    """Graph name -> the traits of its host."""
    return {name: _component_traits(component) for name, component in list_components(model).items()}


def traits_from_json(stored: Mapping[str, Any]) -> dict[str, ModelTraits]:
    """The inverse of ``ModelTraits.to_json``, by graph."""
    return {
        name: ModelTraits(
            config=None if told["config"] is None else StoredConfig(told["config"]),
            dtype=getattr(torch, told["dtype"]),
            device=torch.device(told["device"]),
            generation=told["generation"],
            rules=None if told.get("rules") is None else CustomGeneration(**told["rules"]),
        )
        for name, told in stored.items()
    }


def _config_entries(config: Any) -> dict[str, Any] | None:
    """The entries of a configuration: of transformers', of diffusers', or of any object with attributes."""
    if config is None or isinstance(config, Mapping):
        return None if config is None else dict(config)
    told = getattr(config, "to_dict", None)
    return dict(told()) if callable(told) else dict(vars(config))


def _json_values(entries: Mapping[str, Any] | None) -> Any:
    """What JSON can hold of some entries."""
    return json.loads(json.dumps(entries, default=lambda _: None))


def _generation_settings(model: nn.Module) -> dict[str, Any] | None:
    """What a model's generation configuration says."""
    can, config = getattr(model, "can_generate", None), getattr(model, "generation_config", None)
    if not callable(can) or not can() or config is None:
        return None
    said = config.to_dict()
    return {name: value for name, value in said.items() if value is not None and name != "transformers_version"}


def _component_traits(model: nn.Module) -> ModelTraits:
    tensors = [*model.parameters(), *model.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype())
    device = tensors[0].device if tensors else torch.device("cpu")
    generation = _generation_settings(model)
    return ModelTraits(
        getattr(model, "config", None),
        dtype,
        device,
        generation,
        None if generation is None else _custom_generation(model),
    )


_COMMON_MIXIN = "GenerationMixin"
_NESTED_ATTRIBUTE = re.compile(r"\bself\.((?:[a-zA-Z]\w*\.)+\w+)")
"""An attribute of an attribute of a model, in the source of its class."""


def _class_source(cls: type) -> str:
    """A class's source; nothing where it lies in no file."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, None)


def _custom_generation(model: nn.Module) -> CustomGeneration | None:
    """The class that brings a model's ``generate``; None where that is the one of all."""
    owner = next((cls for cls in type(model).__mro__ if "generate" in vars(cls)), None)
    if owner is None or owner.__name__ == _COMMON_MIXIN:
        return None
    modules = dict(model.named_children())
    paths = {path for path in _NESTED_ATTRIBUTE.findall(_class_source(owner)) if path.partition(".")[0] in modules}
    whole: Any = model
    read = {path: functools.reduce(_attribute, path.split("."), whole) for path in paths}
    told = {path: value for path, value in read.items() if isinstance(value, int | float | str | tuple)}
    return CustomGeneration(f"{owner.__module__}:{owner.__qualname__}", told)
