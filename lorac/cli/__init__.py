"""The command line: the words of the Python interface. One file per group of commands."""

from __future__ import annotations

import sys

import typer

from lorac.cli import adapters, artifacts, models
from lorac.errors import LoracError

app = typer.Typer(
    name="lorac",
    help="The compiler for adapters: one graph from a model and its adapters, swapped while it runs.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (models, adapters, artifacts):
    group.register(app)


def main() -> None:
    """Entry point: typed errors are printed as they are and exit with 1."""
    try:
        app()
    except LoracError as error:
        print(f"lorac.{type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
