"""Commands about adapter files: inspect, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from lorac.cli._hosts import MODEL_HELP, load_model

OptionalModel = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    for command in (inspect, convert):
        app.command()(command)


def inspect(
    path: Annotated[Path, typer.Argument(help="An adapter's file or folder.")], model: OptionalModel = ""
) -> None:
    """Say what an adapter file holds; with --model, check it against the model too."""
    from lorac.formats import load_adapter

    adapter = load_adapter(path, load_model(model) if model else None)
    console = Console()
    shown = ", ".join(
        f"{name}={value!r}" for name, value in adapter.variant.settings.items() if value not in ((), {}, None)
    )
    console.print(f"{adapter.name}: {type(adapter.variant).__name__}({shown})", markup=False)
    console.print(
        f"{len(adapter.sites)} sites, {len(adapter.replaced)} replaced parameters, {adapter.numel():,} values"
    )
    table = Table("site", "tensors")
    for site, tensors in adapter.tensors.items():
        table.add_row(site, "  ".join(f"{name}{list(t.shape)}" for name, t in tensors.items()))
    for name, tensor in adapter.replaced.items():
        table.add_row(name, f"replaced by {list(tensor.shape)}")
    console.print(table)


def convert(
    source: Annotated[Path, typer.Argument(help="An adapter's file or folder.")],
    destination: Annotated[Path, typer.Argument(help="Where to write.")],
    format: Annotated[str, typer.Option("--format", "-f", help="peft or native.")] = "peft",
    model: OptionalModel = "",
) -> None:
    """Write an adapter in another format."""
    from lorac.formats import load_adapter, save_adapter

    host = load_model(model) if model else None
    save_adapter(load_adapter(source, host), destination, format=format, model=host)
    print(f"{destination}: {format}")
