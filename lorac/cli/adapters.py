"""Commands about files: inspect, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorac.cli._inspection import describe_adapter_file, describe_folder, format_contents
from lorac.cli._models import MODEL_HELP, load_model
from lorac.cli._output import JsonOption, print_report
from lorac.progress import progress
from lorac.storage.atomic_folders import MANIFEST


def _list_formats() -> list[str]:
    from lorac.formats import formats

    return [name for name, found in formats().items() if found.writes]


ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
FormatOption = Annotated[
    str, typer.Option("--format", "-f", help="peft, adapterhub or native.", autocompletion=_list_formats)
]


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter's file or folder, or a compiled folder.")],
    model: ModelOption = "",
    json: JsonOption = False,
) -> None:
    """Print the contents of a compiled folder or an adapter's file; --model checks the adapter against a model."""
    from lorac.formats import load_adapter

    with progress("inspect") as report:
        report.step("reading")
        if (path / MANIFEST).is_file():
            contents = describe_folder(path)
        else:
            contents = describe_adapter_file(load_adapter(path, load_model(model) if model else None), path)
    print_report(contents, *format_contents(contents), as_json=json)


def convert(
    source: Annotated[Path, typer.Argument(help="An adapter's file or folder.")],
    destination: Annotated[Path, typer.Argument(help="Where to write.")],
    format: FormatOption = "peft",
    model: ModelOption = "",
    json: JsonOption = False,
) -> None:
    """Write an adapter in another format."""
    from lorac.formats import load_adapter, save_adapter

    with progress("convert") as report:
        report.step("reading")
        host = load_model(model) if model else None
        adapter = load_adapter(source, host)
        report.step("writing")
        save_adapter(adapter, destination, format=format, model=host)
    print_report({"path": str(destination), "format": format}, f"{destination}: {format}", as_json=json)


COMMANDS = (inspect, convert)
