"""Where a command line's MODEL comes from, and how its adapters are spelled."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from lorac.errors import AdapterExists, ChoiceError, MissingExtra, UnknownOption

MODEL_HELP = "A folder saved by transformers, or package.module:function returning an nn.Module."
ADAPTER_HELP = "NAME=PATH, or PATH; may be given several times."


def load_model(spec: str) -> nn.Module:
    """The model a command names.

    Raises:
        UnknownOption: neither a transformers folder nor an importable function.
        MissingExtra: the folder needs transformers.
    """
    if Path(spec).is_dir():
        return _from_folder(Path(spec))
    module, separator, function = spec.partition(":")
    if not separator:
        raise UnknownOption(f"'{spec}' is no model", next_step=MODEL_HELP)
    sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise UnknownOption(f"'{spec}' cannot be loaded: {error}", next_step=MODEL_HELP) from error
    model = made[0] if isinstance(made, tuple) else made
    if not isinstance(model, nn.Module):
        raise UnknownOption(f"'{spec}' returns a {type(model).__name__}, not an nn.Module")
    return model.eval()


def _from_folder(folder: Path) -> nn.Module:
    config = folder / "config.json"
    if not config.is_file():
        raise UnknownOption(f"'{folder}' holds no config.json", next_step=MODEL_HELP)
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "hf") from error
    try:
        architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or ["AutoModel"]
        model: nn.Module = getattr(transformers, architectures[0]).from_pretrained(folder)
    except (OSError, ValueError, AttributeError) as error:
        raise UnknownOption(f"'{folder}' cannot be loaded: {error}", next_step=MODEL_HELP) from error
    return model.eval()


def named_adapters(specs: list[str]) -> dict[str, str]:
    """NAME=PATH, or PATH named after its folder.

    Raises:
        AdapterExists: two of one name.
    """
    found: dict[str, str] = {}
    for spec in specs:
        name, separator, path = spec.partition("=")
        if not separator:
            name, path = Path(spec).stem, spec
        if name in found:
            raise AdapterExists(f"two adapters are called '{name}'", next_step="name them: -a NAME=PATH")
        found[name] = path
    return found


def parse_spec(text: str | None) -> Any:
    """A choice on the command line: ``none``, ``name``, or ``a=0.7,b=0.3``."""
    if text is None or text == "none":
        return None
    if "=" not in text:
        return text
    try:
        parts = [(name, float(value)) for name, value in (part.split("=") for part in text.split(","))]
        if len(dict(parts)) < len(parts):
            raise ValueError("a name is given twice")
        return dict(parts)
    except ValueError as error:
        raise ChoiceError(f"'{text}' is no choice of adapters", next_step="write none, NAME, or A=0.7,B=0.3") from error
