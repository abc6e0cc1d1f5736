"""Commands about files: inspect, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorac.cli._contents import of_adapter, of_folder, shown
from lorac.cli._hosts import MODEL_HELP, load_model
from lorac.cli._shown import Json, show
from lorac.ir.store.folders import MANIFEST
from lorac.progress import progress


def _formats() -> list[str]:
    from lorac.formats import formats

    return [name for name, found in formats().items() if found.save is not None]


OptionalModel = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
Format = Annotated[str, typer.Option("--format", "-f", help="peft, adapterhub or native.", autocompletion=_formats)]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for command in (inspect, convert):
        app.command()(command)


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter's file or folder, or a compiled folder.")],
    model: OptionalModel = "",
    json: Json = False,
) -> None:
    """Say what a compiled folder or an adapter's file holds; with --model, check the adapter against the model too."""
    from lorac.formats import load_adapter

    with progress("inspect") as report:
        report.step("reading")
        if (path / MANIFEST).is_file():
            held = of_folder(path)
        else:
            held = of_adapter(load_adapter(path, load_model(model) if model else None), path)
    show(held, *shown(held), as_json=json)


def convert(
    source: Annotated[Path, typer.Argument(help="An adapter's file or folder.")],
    destination: Annotated[Path, typer.Argument(help="Where to write.")],
    format: Format = "peft",
    model: OptionalModel = "",
    json: Json = False,
) -> None:
    """Write an adapter in another format."""
    from lorac.formats import load_adapter, save_adapter

    with progress("convert") as report:
        report.step("reading")
        host = load_model(model) if model else None
        adapter = load_adapter(source, host)
        report.step("writing")
        save_adapter(adapter, destination, format=format, model=host)
    show({"path": str(destination), "format": format}, f"{destination}: {format}", as_json=json)
