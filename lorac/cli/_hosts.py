"""Where a command line's MODEL comes from, and how its adapters are spelled."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn

from lorac.errors import AdapterExists, ChoiceError, MissingExtra, UnknownOption, short, warn
from lorac.ir.store.disk import told
from lorac.ir.store.strict_json import parse_object, read_text
from lorac.quiet import quiet

MODEL_HELP = "A folder saved by transformers, or package.module:function returning an nn.Module."
ADAPTER_HELP = "NAME=PATH, or PATH; may be given several times."


def load_model(spec: str) -> nn.Module:
    """The model a command names.

    Raises:
        UnknownOption: neither a transformers folder nor a function that returns one, or loading it fails.
        MissingExtra: the folder needs transformers.
    """
    if Path(spec).is_dir():
        return _from_folder(Path(spec))
    module, separator, function = spec.partition(":")
    if not (separator and _is_dotted(module) and _is_dotted(function)):
        raise UnknownOption(f"'{spec}' is no model", next_step=MODEL_HELP)
    sys.path.insert(0, os.getcwd())
    try:
        made = attrgetter(function)(importlib.import_module(module))()
    except Exception as error:  # it is the user's own code
        raise UnknownOption(f"'{spec}' cannot be loaded: {_said(error)}", next_step=MODEL_HELP) from error
    model = made[0] if isinstance(made, tuple) and made else made
    if not isinstance(model, nn.Module):
        raise UnknownOption(f"'{spec}' returns a {type(model).__name__}, not an nn.Module", next_step=MODEL_HELP)
    return model.eval()


def tokenizer_of(spec: str) -> Any:
    """The tokenizer that lies beside a model of a folder; None where there is none, or it cannot be read."""
    from lorac.runtime.generation.tokenizers import read_tokenizer

    if not (Path(spec) / "tokenizer_config.json").is_file():
        return None
    try:
        return read_tokenizer(Path(spec))
    except Exception as error:  # whatever a damaged folder makes transformers raise
        warn(f"the tokenizer in '{spec}' cannot be loaded, and is left out: {_said(error)}")
        return None


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _from_folder(folder: Path) -> nn.Module:
    config = folder / "config.json"
    if not config.is_file():
        raise UnknownOption(f"'{folder}' holds no config.json", next_step=MODEL_HELP)
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "hf") from error
    name = _architecture(config)
    cls = getattr(transformers, name, None) if name.isidentifier() and not name.startswith("_") else None
    if not callable(getattr(cls, "from_pretrained", None)):
        raise UnknownOption(
            f"'{config}' names the architecture {short(name)}, no model of transformers {transformers.__version__}",
            next_step="pip install -U transformers, or give package.module:function",
        )
    try:
        with quiet(), _no_bars(transformers):
            model: nn.Module = cls.from_pretrained(folder)  # type: ignore[union-attr]  # a class that has it
    except Exception as error:  # whatever a damaged folder makes transformers raise
        raise UnknownOption(f"'{folder}' cannot be loaded: {_said(error)}", next_step=MODEL_HELP) from error
    if not isinstance(model, nn.Module):
        raise UnknownOption(f"'{folder}' holds a {type(model).__name__}, not an nn.Module", next_step=MODEL_HELP)
    return model.eval()


@contextlib.contextmanager
def _no_bars(transformers: Any) -> Iterator[None]:
    """transformers draws bars of its own while it loads."""
    logging = transformers.utils.logging
    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def _architecture(config: Path) -> str:
    """The class that a transformers configuration names; "AutoModel" where it names none."""

    def refuse(reason: str) -> UnknownOption:
        return UnknownOption(f"'{config}' {reason}", next_step=MODEL_HELP)

    with told(config, UnknownOption, "read"):
        named = parse_object(read_text(config), refuse).get("architectures")
    if named is None or named == []:
        return "AutoModel"
    if not isinstance(named, list) or not isinstance(named[0], str):
        raise refuse(f"names no architecture by architectures={short(named)}")
    return named[0]


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
