"""The traits of a model: the attributes that pipelines and generation read."""

import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorac.argument_types import JsonMapping
from lorac.frontend.components import list_components

_COMMON_MIXIN = "GenerationMixin"
_NESTED_ATTRIBUTE = re.compile(r"\bself\.((?:[a-zA-Z]\w*\.)+\w+)")
"""An attribute of a submodule, such as ``self.decoder.size``, in the source of a model's class."""


class StoredConfig(dict[str, Any]):
    """A model's configuration from an artifact: a mapping whose entries are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass(frozen=True)
class CustomGeneration:
    """A class that overrides transformers' common ``generate``.

    Attributes:
        path: the class: its module, a colon and its name.
        asks: path of an attribute of the model's modules that the class reads, such as a size -> value.
    """

    path: str
    asks: JsonMapping


@dataclass(frozen=True)
class ModelTraits:
    """Attributes that pipelines and ``generate`` read from a model.

    Attributes:
        config: the model's configuration, or None.
        dtype: the dtype of the model's first floating-point tensor.
        device: the device of the model's first tensor.
        generation: the set entries of the generation configuration; None if the model does not generate.
        rules: the class that overrides ``generate``, or None.
    """

    config: Any
    dtype: torch.dtype
    device: torch.device
    generation: JsonMapping | None = None
    rules: CustomGeneration | None = None

    @property
    def settings(self) -> JsonMapping:
        """The entries of the configuration, merged over those of its ``text_config``, if it has one."""
        entries = _config_entries(self.config) or {}
        text = entries.get("text_config")
        return {**text, **entries} if isinstance(text, Mapping) else entries

    def to_json(self) -> dict[str, object]:
        """Return the traits as JSON; entries of the configuration that JSON cannot hold are None."""
        rules = None if self.rules is None else {"path": self.rules.path, "asks": self.rules.asks}
        return {
            "config": _to_json(_config_entries(self.config)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "generation": _to_json(self.generation),
            "rules": _to_json(rules),
        }


def traits_from_json(stored: JsonMapping) -> dict[str, ModelTraits]:
    """Return the traits of each graph's model from their JSON."""
    return {
        name: ModelTraits(
            config=None if entry["config"] is None else StoredConfig(entry["config"]),
            dtype=getattr(torch, entry["dtype"]),
            device=torch.device(entry["device"]),
            generation=entry["generation"],
            rules=None if entry.get("rules") is None else CustomGeneration(**entry["rules"]),
        )
        for name, entry in stored.items()
    }


def collect_traits(model: nn.Module) -> dict[str, ModelTraits]:
    """Return the traits of each graph's model."""
    traits = dict[str, ModelTraits]()
    for name, part in list_components(model).items():
        tensors = [*part.parameters(), *part.buffers()]
        can_generate, config = getattr(part, "can_generate", None), getattr(part, "generation_config", None)
        generation = None
        if callable(can_generate) and can_generate() and config is not None:
            entries = config.to_dict().items()
            generation = {key: value for key, value in entries if value is not None and key != "transformers_version"}
        traits[name] = ModelTraits(
            config=getattr(part, "config", None),
            dtype=next((t.dtype for t in tensors if t.is_floating_point()), torch.get_default_dtype()),
            device=tensors[0].device if tensors else torch.device("cpu"),
            generation=generation,
            rules=None if generation is None else _custom_generation(part),
        )
    return traits


def _config_entries(config: object) -> dict[str, object] | None:
    """Return the entries of transformers' configuration, of diffusers', or of any object with attributes."""
    if config is None:
        return None
    if isinstance(config, Mapping):
        return dict(config)
    to_dict = getattr(config, "to_dict", None)
    return dict(to_dict()) if callable(to_dict) else dict(vars(config))


def _to_json(entries: JsonMapping | None) -> object:
    return json.loads(json.dumps(entries, default=lambda _: None), parse_constant=lambda _: None)


def _custom_generation(model: nn.Module) -> CustomGeneration | None:
    """Return the class that defines a model's ``generate``, or None if that is transformers' common one."""
    owner = next((cls for cls in type(model).__mro__ if "generate" in vars(cls)), None)
    if owner is None or owner.__name__ == _COMMON_MIXIN:
        return None
    modules = dict(model.named_children())
    values: dict[str, object] = {}
    try:
        source = inspect.getsource(owner)
    except (OSError, TypeError):  # the class is not in a file
        source = ""
    for path in _NESTED_ATTRIBUTE.findall(source):
        if path.partition(".")[0] in modules:
            value: object = model
            for name in path.split("."):
                value = getattr(value, name, None)
            values[path] = value
    read = {path: value for path, value in values.items() if isinstance(value, int | float | str | tuple)}
    return CustomGeneration(f"{owner.__module__}:{owner.__qualname__}", read)
