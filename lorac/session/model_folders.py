"""Models in folders of transformers and diffusers: find their class, load them, or build them without weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lorac.argument_types import JsonMapping
from lorac.errors import OptionError, short, translate_import_errors
from lorac.storage.paths import translate_os_errors
from lorac.storage.remote import NAME_FORMS
from lorac.storage.strict_json import parse_object, read_json_text
from lorac.third_party_output import hide_progress_bars, suppress_third_party_output

if TYPE_CHECKING:
    from torch import nn

MODEL_HELP = (
    f"A folder saved by transformers or diffusers, {NAME_FORMS}; or package.module:function returning an nn.Module."
)
ANOTHER_MODEL = f"give a{MODEL_HELP[1:]}"
CONFIG = "config.json"
_PIPELINE = "model_index.json"
_LIBRARIES = {"_class_name": "diffusers", "architectures": "transformers"}
"""Entry of a configuration that names the model's class -> the library."""
ModelClass: TypeAlias = Any
"""A class of a library without type annotations."""


def read_model_config(folder: Path) -> JsonMapping:
    """Return the configuration in a model's folder.

    Raises:
        OptionError: the folder has no configuration, or it is not JSON.
    """
    config = folder / CONFIG
    if (folder / _PIPELINE).is_file():
        models = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        raise OptionError(
            f"'{folder}' is a pipeline of several models", next_step=f"give the folder of one: {', '.join(models)}"
        )
    if not config.is_file():
        raise OptionError(f"'{folder}' has no {CONFIG}", next_step=ANOTHER_MODEL)
    with translate_os_errors(config, OptionError, "read"):
        return parse_object(read_json_text(config), lambda reason: _refuse_config(folder, reason))


def load_model_folder(folder: Path) -> nn.Module:
    """Load the model of a folder, in eval mode.

    Raises:
        OptionError: the folder contains no model, or loading the model fails.
        MissingExtra: the library that saved it is not installed.
    """
    return _make_model(folder, lambda cls: cls.from_pretrained(folder))


def outline_model(folder: Path) -> nn.Module:
    """Return the model of a folder on the meta device, built from its configuration alone.

    Raises:
        OptionError, MissingExtra: as ``load_model_folder``.
    """
    import torch

    def make(cls: ModelClass) -> object:
        with torch.device("meta"):
            if hasattr(cls, "load_config"):  # of diffusers
                return cls.from_config(cls.load_config(folder))
            if hasattr(cls, "config_class"):
                model = cls(cls.config_class.from_pretrained(folder))
                model.tie_weights()  # transformers 5.0 does not tie weights on the meta device
                return model
            configurations = importlib.import_module("transformers").AutoConfig
            return cls.from_config(configurations.from_pretrained(folder))

    return _make_model(folder, make)


def _make_model(folder: Path, make: Callable[[ModelClass], object]) -> nn.Module:
    from torch import nn

    config = read_model_config(folder)
    entry = next((entry for entry in _LIBRARIES if entry in config), "architectures")
    named, package = config.get(entry), _LIBRARIES[entry]
    listed = [named] if package == "diffusers" else named or ["AutoModel"]
    name = listed[0] if isinstance(listed, list) else None
    if not isinstance(name, str):
        raise _refuse_config(folder, f"names no known architecture by {entry}={short(named)}")
    with translate_import_errors():
        library = importlib.import_module(package)
    cls = getattr(library, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not callable(getattr(cls, "from_pretrained", None)):
        raise OptionError(
            f"'{folder / CONFIG}' names the architecture {short(name)}, unknown to {package} {library.__version__}",
            next_step=f"pip install -U {package}, or give package.module:function",
        )
    try:
        with suppress_third_party_output(), hide_progress_bars():
            model = make(cls)
    except Exception as error:  # a damaged folder may make the libraries raise anything
        reason = f"{type(error).__name__}: {error}"
        raise OptionError(f"'{folder}' cannot be loaded: {reason}", next_step=ANOTHER_MODEL) from error
    if not isinstance(model, nn.Module):
        raise OptionError(f"'{folder}' holds a {type(model).__name__}, not an nn.Module", next_step=ANOTHER_MODEL)
    return model.eval()


def _refuse_config(folder: Path, reason: str) -> OptionError:
    return OptionError(f"'{folder / CONFIG}' {reason}", next_step=ANOTHER_MODEL)
