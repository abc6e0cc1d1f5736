"""The file adapter_config.json of AdapterHub: ``{"config": {…}, "model_type": …, "name": …, …}``.

The field ``architecture`` of "config" names the kind of adapter. The kind "union" holds a list of configurations.
Source: adapters.configuration of the library adapters 1.3.0.
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
from lorac.formats.adapterhub.loras import ARCHITECTURE as LORA_ARCHITECTURE
from lorac.formats.adapterhub.loras import TASKS_ARCHITECTURE, read_loras

_FIELDS = ("name", "model_type", "config", "hidden_size", "model_name", "model_class", "version", "config_id", "type")
_ARCHITECTURE_FIELD, _UNION, _CONFIGS_FIELD = "architecture", "union", "configs"
# Architecture -> reader of its configurations. Bottlenecks, the oldest kind, have null as their architecture.
_READERS: Mapping[str | None, Callable[[JsonMapping, ConfigHeader], ComponentConfig]] = {
    None: read_bottlenecks,
    LORA_ARCHITECTURE: read_loras,
    TASKS_ARCHITECTURE: functools.partial(read_loras, tasks=True),
}
# Architectures for which lorac has no method -> their effect.
_REFUSED = {
    "prefix_tuning": "puts keys and values in front of the tokens' keys and values",
    "prompt_tuning": "puts embeddings in front of the tokens' embeddings",
    "reft": "rewrites hidden states at some positions",
}
VERSION = "adapters.1.3.0"
"""The library's version in the files that lorac writes."""


def read_config(raw: JsonMapping, file: Path, *, invertible: bool) -> tuple[ConfigHeader, list[ComponentConfig]]:
    """Return the header of a file, and its configurations: several for a union, otherwise one.

    Args:
        raw: the parsed JSON of the file.
        file: path of the file, for messages.
        invertible: whether the tensors beside the file include those of an invertible adapter.

    Raises:
        FormatError: a field is missing, unknown to the library, or has a value that lorac does not support.
    """
    refuse_unknown_fields(raw, _FIELDS, file)
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
    if config.get(_ARCHITECTURE_FIELD) != _UNION:
        return header, [_read_component(config, header)]
    refuse_unknown_fields(config, (_ARCHITECTURE_FIELD, _CONFIGS_FIELD), file)
    parts = config.get(_CONFIGS_FIELD)
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise corrupt_error(f"'{file}' describes a union, and has no {_CONFIGS_FIELD}")
    return header, [_read_component(part, header) for part in parts]


def _read_component(config: JsonMapping, header: ConfigHeader) -> ComponentConfig:
    architecture = config.get(_ARCHITECTURE_FIELD)
    read = _READERS.get(architecture) if isinstance(architecture, str | None) else None
    if read is None:
        effect = _REFUSED.get(architecture, "") if isinstance(architecture, str) else ""
        known = ", ".join(name for name in _READERS if name)
        raise unsupported_error(
            f"'{header.file}' has the architecture {short(architecture)}{effect and f', which {effect}'}; lorac reads "
            f"these adapters of AdapterHub: bottlenecks, {known} and unions of these",
            next_step="run it in AdapterHub's library, or train one of these",
        )
    return read({name: value for name, value in config.items() if name != _ARCHITECTURE_FIELD}, header)


def join_configs(components: Sequence[ComponentFile]) -> JsonMapping:
    """Return the configurations of all components as one, a union if there are several; ``read_config`` splits it."""
    configs = [component.config for component in components]
    return configs[0] if len(configs) == 1 else {_ARCHITECTURE_FIELD: _UNION, _CONFIGS_FIELD: configs}
