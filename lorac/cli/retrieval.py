"""The command that finds adapters by a prompt: retrieve."""

from pathlib import Path
from typing import Annotated

import typer

from lorac.cli._models import load_model
from lorac.cli._output import JsonOption, format_number, make_table, print_report
from lorac.cli.adapters import ModelOption


def retrieve(
    prompt: Annotated[str, typer.Argument(help="What is asked for, in words.")],
    folder: Annotated[Path, typer.Option("--from", help="A folder of adapters, one file or folder each.")],
    retriever: Annotated[
        Path | None,
        typer.Option("--retriever", help="What Retriever.save wrote; default: the folder `retriever` in --from."),
    ] = None,
    top: Annotated[int, typer.Option("--top", "-k", help="How many adapters, a whole number above 0.")] = 3,
    model: ModelOption = "",
    json: JsonOption = False,
) -> None:
    """Print the adapters of a folder that fit a prompt best, by their weights alone."""
    from lorac.diffusion.retrieval import Retriever, find_adapters

    host = load_model(model) if model else None
    found = find_adapters(Retriever.load(retriever or folder / "retriever"), prompt, folder, top=top, model=host)
    rows = [(match.name, format_number(match.score), match.path) for match in found]
    print_report(found, make_table(("adapter", "cosine", "path"), rows), as_json=json)


COMMANDS = (retrieve,)
