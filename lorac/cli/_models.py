"""The models and adapters that a command line names."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorac.errors import AdapterError, ChoiceError, OptionError, nearest_name, warn
from lorac.session.model_folders import ANOTHER_MODEL, CONFIG, load_model_folder
from lorac.storage.atomic_folders import MANIFEST
from lorac.storage.remote import NAME_FORMS, find_source, find_stem

if TYPE_CHECKING:
    from torch import nn

    from lorac.session.compiled import Compiled

COMPILED_HELP = (
    f"A folder, {NAME_FORMS}, written by `lorac compile`; or a model: one saved by transformers, or "
    "package.module:function."
)
CompiledOrModel = Annotated[str, typer.Argument(help=COMPILED_HELP, metavar="MODEL")]
AdapterOption = Annotated[
    list[str], typer.Option("--adapter", "-a", help=f"NAME=PATH or PATH, {NAME_FORMS}; may be given several times.")
]
PrepackedOption = Annotated[
    Path | None,
    typer.Option(help="A folder for prepacked weights, which processes map instead of each having a copy of its own."),
]
TrustOption = Annotated[
    bool,
    typer.Option("--trust", help="Take a compiled folder of eager or aoti that you made, or whose maker you trust."),
]


def load_model(spec: str) -> nn.Module:
    """Load the model that a command names; raises as ``load_with_tokenizer``."""
    return load_with_tokenizer(spec)[0]


def load_compiled(
    spec: str, adapters: Sequence[str], *, prepacked: Path | None = None, trust: bool = False, **options: Any
) -> Compiled:
    """Load a compiled folder, or compile a model for target "eager", with its tokenizer.

    Args:
        spec: the folder or the model.
        adapters: the adapters of the command line.
        prepacked: the option of target "onnxruntime".
        trust: as for ``lorac.load``.
        options: further arguments of ``lorac.compile``.

    Raises:
        OptionError: adapters are given for a compiled folder, which has its own, or trust is given for a model.
        LoracError: loading or compiling fails.
    """
    import lorac

    folder = find_source(spec, "MODEL", OptionError)
    more = dict[str, Any]() if prepacked is None else {"prepacked": prepacked}
    if (folder / MANIFEST).is_file() or (folder.exists() and not (folder / CONFIG).is_file()):
        if adapters:
            raise OptionError(
                f"'{spec}' is compiled, and holds adapters of its own",
                next_step="give the model itself, or compile it with them: lorac compile MODEL -a NAME=PATH -o FOLDER",
            )
        return lorac.load(folder, trust=trust, **more)
    if ":" not in spec and not folder.exists():
        raise OptionError(
            f"'{spec}' is neither a compiled folder nor a model",
            nearest=_nearest_folder(folder, MANIFEST, CONFIG),
            next_step=f"give a{COMPILED_HELP[1:]}",
        )
    if trust:
        raise OptionError(f"'{spec}' is a model, and --trust is for compiled folders", next_step="leave it out")
    model, tokenizer = load_found_model(folder)
    compiled = lorac.compile(model, parse_adapters(adapters), **more, **options)
    compiled.tokenizer = tokenizer
    return compiled


def _nearest_folder(meant: Path, *files: str) -> str | None:
    """Return the folder next to a missing one that has the most similar name and one of these files."""
    return nearest_name(meant.name, [found.parent.name for name in files for found in meant.parent.glob(f"*/{name}")])


def load_with_tokenizer(spec: str) -> tuple[nn.Module, object]:
    """Load the model that a command names, and its tokenizer, or None; raises as ``load_found_model``."""
    return load_found_model(find_source(spec, "MODEL", OptionError))


def load_found_model(spec: Path) -> tuple[nn.Module, object]:
    """Load a model from the place that ``find_source`` found, and its tokenizer, or None.

    Raises:
        OptionError: it is neither a folder of transformers nor a function that returns a model, or loading fails.
        MissingExtra: the folder needs transformers.
    """
    if spec.is_dir():
        return load_model_folder(spec), load_tokenizer(spec)
    from torch import nn

    module, separator, function = str(spec).partition(":")
    if not (separator and _is_dotted(module) and _is_dotted(function)):
        raise OptionError(f"'{spec}' is not a model", nearest=_nearest_folder(spec, CONFIG), next_step=ANOTHER_MODEL)
    sys.path.insert(0, os.getcwd())
    try:
        returned = attrgetter(function)(importlib.import_module(module))()
    except Exception as error:  # user code may raise anything
        raise OptionError(f"'{spec}' cannot be loaded: {_format_exception(error)}", next_step=ANOTHER_MODEL) from error
    model, tokenizer = (*returned, None)[:2] if isinstance(returned, tuple) and returned else (returned, None)
    if not isinstance(model, nn.Module):
        raise OptionError(f"'{spec}' returns a {type(model).__name__}, not an nn.Module", next_step=ANOTHER_MODEL)
    return model.eval(), tokenizer if callable(getattr(tokenizer, "decode", None)) else None


def load_tokenizer(folder: Path) -> object:
    """Load the tokenizer or processor in a model's folder; return None where it is missing or cannot be read."""
    from lorac.runtime.generation.tokenizers import read_processor

    if not (folder / "tokenizer_config.json").is_file():
        return None
    try:
        return read_processor(folder)
    except Exception as error:  # a damaged folder may make transformers raise anything
        warn(f"the tokenizer in '{folder}' cannot be loaded: {_format_exception(error)}")
        return None


def load_image_processor(spec: Path, kind: str = "AutoImageProcessor") -> object:
    """Load the image processor in a model's folder, or the processor of another class of transformers (``kind``).

    Raises:
        OptionError: the processor is missing, or cannot be read.
    """
    import transformers

    try:
        return getattr(transformers, kind).from_pretrained(spec)
    except Exception as error:  # a damaged folder may make transformers raise anything
        raise OptionError(
            f"'{spec}' has no image processor: {_format_exception(error)}",
            next_step="save it there: image_processor.save_pretrained",
        ) from error


def _is_dotted(text: str) -> bool:
    return all(part.isidentifier() for part in text.split("."))


def _format_exception(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def parse_adapters(specs: Sequence[str]) -> dict[str, str]:
    """Return name -> path of adapters that are given as NAME=PATH, or as PATH, which gives the name too.

    Raises:
        AdapterError: two adapters have the same name.
    """
    found: dict[str, str] = {}
    for spec in specs:
        name, path = spec.split("=", 1) if "=" in spec else (find_stem(spec), spec)
        if name in found:
            raise AdapterError(
                f"two adapters are called '{name}'", next_step="name them: -a NAME=PATH", code="adapter_exists"
            )
        found[name] = path
    return found


def parse_choice(text: str | None) -> str | dict[str, float] | None:
    """Return the choice of adapters in ``none``, ``name``, or ``a=0.7,b=0.3``."""
    if text is None or text == "none":
        return None
    if "=" not in text:
        return text
    with contextlib.suppress(ValueError):
        parts = [(name, float(value)) for name, value in (part.split("=") for part in text.split(","))]
        if len(dict(parts)) == len(parts):
            return dict(parts)
    raise ChoiceError(f"'{text}' is not a choice of adapters", next_step="write none, NAME, or A=0.7,B=0.3")


def parse_option(spec: str) -> tuple[str, object]:
    """Return name and value of a method's option in KEY=VALUE; a value is JSON, or else text.

    Raises:
        OptionError: there is no KEY=.
    """
    name, separator, text = spec.partition("=")
    if not separator or not name:
        raise OptionError(f"'{spec}' is not an option of a method", next_step="write KEY=VALUE, such as -s density=0.5")
    try:
        return name, json.loads(text)
    except ValueError:
        return name, text
