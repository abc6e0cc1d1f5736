"""The command that serves a compiled model: serve."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lorac.cli._models import PrepackedOption
from lorac.errors import OptionError


def serve(  # noqa: PLR0913, PLR0917  (a command's options)
    folder: Annotated[Path, typer.Argument(help="A folder written by `lorac compile`, with a tokenizer.")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is every network's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 8000,
    rows: Annotated[int, typer.Option(help="The most requests at work.")] = 8,
    waiting: Annotated[int, typer.Option(help="The most requests that wait.")] = 64,
    max_new_tokens: Annotated[int, typer.Option("--max-tokens", help="The most tokens of an answer.")] = 1024,
    deadline: Annotated[float | None, typer.Option(help="Seconds after which a request ends; default: never.")] = None,
    grace: Annotated[float, typer.Option(help="Seconds to finish requests at work, when it is to stop.")] = 150,
    base_name: Annotated[str, typer.Option("--name", help="The model without adapters, in requests.")] = "base",
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
    pinned: Annotated[
        list[str] | None, typer.Option("--pin", help="An adapter that stays in memory; may be given several times.")
    ] = None,
    pooling: Annotated[str, typer.Option(help="How an encoder's states become an embedding: mean or cls.")] = "mean",
    predict: Annotated[
        bool | None,
        typer.Option(help="Whether /v1/predict gives the model's outputs; default: unless it continues text."),
    ] = None,
    prepacked: PrepackedOption = None,
    keys: Annotated[
        Path | None, typer.Option("--keys", help="A JSON file of API key -> tenant; default: everybody may ask.")
    ] = None,
) -> None:
    """Serve a compiled model with OpenAI's interface; its adapters are the models that clients name."""
    from lorac.serving import ServingSettings, run

    settings = ServingSettings(
        rows=rows,
        waiting=waiting,
        max_new_tokens=max_new_tokens,
        deadline=deadline,
        grace=grace,
        base_name=base_name,
        pinned=tuple(pinned or ()),
        pooling=pooling,  # type: ignore[arg-type]  # the settings check it
        predict=predict,
        keys={} if keys is None else _read_keys(keys),
    )
    run(folder, settings, host, port, adapters=adapters, store=store, bases=bases or (), prepacked=prepacked)


def _read_keys(path: Path) -> dict[str, str]:
    """Read API keys."""
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OptionError(f"the keys in '{path}' cannot be read: {error}", next_step=_KEYS) from error
    if not isinstance(keys, dict) or not keys or not all(isinstance(one, str) for one in keys.values()):
        raise OptionError(f"'{path}' holds no API keys", next_step=_KEYS)
    return keys


_KEYS = 'write a JSON file: {"key": "tenant", ...}'
COMMANDS = (serve,)
