"""The command that serves a compiled model: serve."""

import dataclasses
import gc
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from lorac.argument_types import broken_limit
from lorac.cli._compile_options import parse_record
from lorac.cli._models import PrepackedOption, TrustOption
from lorac.errors import OptionError
from lorac.serving.settings import ServingSettings, StoreQuotas

_NAMES = {"max_new_tokens": "--max-tokens", "base_name": "--name", "pinned": "--pin", "sources": "--allow-source"}
"""Setting -> its option, where the names differ."""
_LISTS = ("pinned", "sources")
_SWITCH_SECONDS = 1e-4
"""The longest that a thread waits for another that runs Python code. The scheduler's thread may wait after each library
call that releases the interpreter, some forty times a step: with Python's own 5 ms, a step takes seventy times as long.
"""
_KEYS = 'write a JSON file: {"key": "tenant", ...}'


def _read_texts(record: type) -> dict[str, str]:
    """Return attribute -> its text in the docstring of a dataclass."""
    about = re.split(r"\n    (\w+): ", inspect.getdoc(record) or "")
    return {name: " ".join(text.split()) for name, text in zip(about[1::2], about[2::2], strict=True)}


_QUOTAS = " ".join(f"{name}: {text}" for name, text in _read_texts(StoreQuotas).items())
_QUOTA_HELP = f"A quota of each tenant of the store; may be given several times. {_QUOTAS}"


def serve(  # noqa: PLR0913, PLR0917  (a command's options)
    folder: Annotated[Path, typer.Argument(help="A folder written by `lorac compile`, with a tokenizer.")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every network's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 8000,
    metrics_port: Annotated[
        int | None, typer.Option(help="A further port, which gives /metrics without a key, and nothing else.")
    ] = None,
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="A folder of further adapters, read when they are used.")
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option("--store", help="A folder for the adapters that clients upload; default: they may not."),
    ] = None,
    bases: Annotated[
        list[str] | None,
        typer.Option("--base", help="The model's name in the PEFT files of such adapters; may be given several times."),
    ] = None,
    quotas: Annotated[list[str] | None, typer.Option("--quota", metavar="FIELD=VALUE", help=_QUOTA_HELP)] = None,
    prepacked: PrepackedOption = None,
    trust: TrustOption = False,
    **settings: Any,
) -> None:
    """Serve a compiled model with OpenAI's interface; its adapters are the models that clients name."""
    from lorac.serving import run

    file, settings["keys"] = settings["keys"], {}
    if file:
        try:
            settings["keys"] = keys = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OptionError(f"the keys in '{file}' cannot be read: {error}", next_step=_KEYS) from error
        if not isinstance(keys, dict) or not keys or not all(isinstance(one, str) for one in keys.values()):
            raise OptionError(f"'{file}' holds no API keys", next_step=_KEYS)
    for name, value in settings.items():
        if (limit := broken_limit(ServingSettings, name, value, settings)) is not None:
            option = _NAMES.get(name, f"--{name.replace('_', '-')}")
            raise OptionError(f"{option} cannot be {value}", next_step=f"it takes {limit.describe(settings)}")
    given = ServingSettings(**{**settings, **{name: tuple(settings[name] or ()) for name in _LISTS}})
    shared = parse_record("--quota", StoreQuotas, quotas or (), "write FIELD=VALUE, such as rank=16")
    places = {"adapters": adapters, "store": store, "prepacked": prepacked, "metrics_port": metrics_port}
    more = {**places, "bases": bases or (), "quotas": shared, "trust": trust, "ready": tune_process}
    run(folder, given, host, port, **more)  # type: ignore[arg-type]  # by name


def tune_process() -> None:
    """Let threads of this process take turns quickly, and exempt all present objects from garbage collection.

    ``lorac serve`` has a process of its own, so that these settings affect no other code.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()


def _list_options() -> list[inspect.Parameter]:
    """Return the fields of the settings as options, with their texts in the class's docstring as help."""
    texts = _read_texts(ServingSettings) | {"keys": "a JSON file of API key -> tenant; default: everybody may ask."}
    kinds = {**get_type_hints(ServingSettings), "keys": Path | None, **dict.fromkeys(_LISTS, list[str] | None)}
    found = []
    for one in dataclasses.fields(ServingSettings):
        text = texts[one.name].replace("None: ", "default: ").replace("``", "`")
        more = " May be given several times." if one.name in _LISTS else ""
        names = [_NAMES[one.name]] if one.name in _NAMES else []
        default = None if one.name in {"keys", *_LISTS} else one.default
        option = typer.Option(default, *names, help=text[0].upper() + text[1:] + more)
        kind = kinds[one.name]
        found.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=kind))
    return found


_own = inspect.signature(serve)
_parameters = [*list(_own.parameters.values())[:-1], *_list_options()]
serve.__signature__ = _own.replace(parameters=_parameters)  # type: ignore[attr-defined]  # functions take attributes
serve.__annotations__ = {one.name: one.annotation for one in _parameters}
COMMANDS = (serve,)
