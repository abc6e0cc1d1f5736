"""adapter_config.json as AdapterHub writes it: ``{"config": {…}, "model_type": …, "name": …, …}``.

The kind of a configuration is its ``architecture``; a union has several. Source: adapters.configuration of adapters
1.3.0.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lorac.argument_types import JsonMapping
from lorac.errors import short
from lorac.formats._config_fields import refuse_unknown_fields
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats.adapterhub.bottlenecks import read_bottlenecks, read_preset
from lorac.formats.adapterhub.components import ComponentConfig, ComponentFile, ConfigHeader
from lorac.formats.adapterhub.loras import ARCHITECTURE, TASKS_ARCHITECTURE, read_loras

_KNOWN = ("name", "model_type", "config", "hidden_size", "model_name", "model_class", "version", "config_id", "type")
_ARCHITECTURE, _UNION, _CONFIGS = "architecture", "union", "configs"
_READERS: Mapping[str | None, Callable[[JsonMapping, ConfigHeader], ComponentConfig]] = {
    None: read_bottlenecks,
    ARCHITECTURE: read_loras,
    TASKS_ARCHITECTURE: functools.partial(read_loras, tasks=True),
}
"""By architecture."""
_REFUSED = {
    "prefix_tuning": "puts keys and values in front of those of the tokens",
    "prompt_tuning": "puts embeddings in front of those of the tokens",
    "reft": "rewrites hidden states at some positions",
}
"""Architectures that lorac has no method for -> their effect."""
VERSION = "adapters.1.3.0"


def read_config(raw: JsonMapping, file: Path, *, invertible: bool) -> tuple[ConfigHeader, list[ComponentConfig]]:
    """Return the header of a file and its configurations.

    Args:
        invertible: whether the tensors include an invertible adapter's.

    Raises:
        FormatError: a field is missing, or the library does not have it, or lorac does not build its value.
    """
    refuse_unknown_fields(raw, _KNOWN, file)
    config = raw.get("config")
    if isinstance(config, str):
        config = read_preset(config, file)
    if not isinstance(config, dict) or not isinstance(raw.get("name"), str):
        missing = "name" if isinstance(config, dict) else "config"
        raise corrupt_error(f"'{file}' has no {missing}")
    header = ConfigHeader(
        file,
        name=raw["name"],
        model_type=raw.get("model_type"),
        own_class=str(raw.get("model_class", "")).endswith("AdapterModel"),
        versioned="version" in raw,
        task=raw.get("type") == "text_task" and not invertible,
    )
    if config.get(_ARCHITECTURE) != _UNION:
        return header, [_read_component(config, header)]
    refuse_unknown_fields(config, (_ARCHITECTURE, _CONFIGS), file)
    parts = config.get(_CONFIGS)
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise corrupt_error(f"'{file}' is of a union, and has no {_CONFIGS}")
    return header, [_read_component(part, header) for part in parts]


def _read_component(config: JsonMapping, header: ConfigHeader) -> ComponentConfig:
    architecture = config.get(_ARCHITECTURE)
    read = _READERS.get(architecture) if isinstance(architecture, str | None) else None
    if read is None:
        what = _REFUSED.get(architecture, "") if isinstance(architecture, str) else ""
        known = ", ".join(name for name in _READERS if name)
        raise unsupported_error(
            f"'{header.file}' is of the architecture {short(architecture)}{what and f', which {what}'}; of "
            f"AdapterHub's lorac reads bottlenecks, {known} and unions of these",
            next_step="run it in AdapterHub's library, or train one of these",
        )
    return read({name: value for name, value in config.items() if name != _ARCHITECTURE}, header)


def join_configs(components: Sequence[ComponentFile]) -> JsonMapping:
    """Return one configuration of several components, which ``read_config`` splits again."""
    configs = [component.config for component in components]
    return configs[0] if len(configs) == 1 else {_ARCHITECTURE: _UNION, _CONFIGS: configs}
