"""adapter_config.json as AdapterHub writes it: ``{"config": {…}, "model_type": …, "name": …, …}``.

What the configuration is about is its ``architecture``; a union has several. Source: adapters.configuration of adapters
1.3.0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lorac.errors import FormatError, short
from lorac.formats.adapterhub import bottlenecks, loras
from lorac.formats.adapterhub.components import ComponentConfig, ComponentFile, ConfigHeader, refuse_unknown

_WHOLE = {"name", "model_type", "config"}
"""What decides what a file means."""
_IRRELEVANT = {"hidden_size", "model_name", "model_class", "version", "config_id", "type"}
_ARCHITECTURE, _UNION, _CONFIGS = "architecture", "union", "configs"
_Reader = Callable[[Mapping[str, Any], ConfigHeader], ComponentConfig]
_READERS: Mapping[Any, _Reader] = {
    None: bottlenecks.read,
    loras.ARCHITECTURE: loras.read,
    loras.OF_TASKS: functools.partial(loras.read, tasks=True),
}
"""By architecture."""
_REFUSED = {
    "prefix_tuning": "puts keys and values in front of a text's",
    "prompt_tuning": "puts embeddings in front of a text's",
    "reft": "rewrites hidden states at some positions of a text",
}
"""Architectures that lorac has no method for, and what each does."""
VERSION = "adapters.1.3.0"


def read_config(raw: Mapping[str, Any], file: Path, *, invertible: bool) -> tuple[ConfigHeader, list[ComponentConfig]]:
    """What a file says, and the methods it is about.

    Args:
        raw: its content.
        file: for messages.
        invertible: whether the tensors beside it have an invertible adapter's.

    Raises:
        FormatError: a field that the library does not have.
        FormatError: a method, or a value, that lorac does not build.
        FormatError: a field is missing.
    """
    refuse_unknown(raw, {*_WHOLE, *_IRRELEVANT}, file)
    given = raw.get("config")
    if isinstance(given, str):
        given = bottlenecks.preset(given, file)
    if not isinstance(given, dict) or not isinstance(raw.get("name"), str):
        raise FormatError(f"'{file}' has no {'name' if isinstance(given, dict) else 'config'}", code="corrupt_file")
    told = ConfigHeader(
        file,
        name=raw["name"],
        model_type=raw.get("model_type"),
        own_class=str(raw.get("model_class", "")).endswith("AdapterModel"),
        versioned="version" in raw,
        task=raw.get("type") == "text_task" and not invertible,
    )
    return told, [_read(one, told) for one in _parts(given, file)]


def _parts(given: Mapping[str, Any], file: Path) -> Sequence[Mapping[str, Any]]:
    """The configurations of a union, or one that is none."""
    if given.get(_ARCHITECTURE) != _UNION:
        return [given]
    refuse_unknown(given, {_ARCHITECTURE, _CONFIGS}, file)
    parts = given.get(_CONFIGS)
    if not isinstance(parts, list) or not parts or not all(isinstance(part, dict) for part in parts):
        raise FormatError(f"'{file}' is of a union, and has no {_CONFIGS}", code="corrupt_file")
    return parts


def _read(given: Mapping[str, Any], told: ConfigHeader) -> ComponentConfig:
    architecture = given.get(_ARCHITECTURE)
    read = _READERS.get(architecture) if isinstance(architecture, str | None) else None
    if read is None:
        does = _REFUSED.get(architecture, "") if isinstance(architecture, str) else ""
        known = ", ".join(name for name in _READERS if name)
        raise FormatError(
            f"'{told.file}' is of the architecture {short(architecture)}{does and f', which {does}'}; of AdapterHub's "
            f"lorac reads bottlenecks, {known} and unions of these",
            next_step="run it in AdapterHub's library, or train one of these",
            code="unsupported_field",
        )
    return read({name: value for name, value in given.items() if name != _ARCHITECTURE}, told)


def config_of(written: Sequence[ComponentFile]) -> Mapping[str, Any]:
    """One configuration of several: the inverse of what ``read_config`` takes apart."""
    configs = [one.config for one in written]
    return configs[0] if len(configs) == 1 else {_ARCHITECTURE: _UNION, _CONFIGS: configs}
