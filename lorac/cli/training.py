"""Commands about training: train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorac.cli._models import MODEL_HELP, load_with_tokenizer
from lorac.cli._output import JsonOption, print_report
from lorac.errors import OptionError
from lorac.progress import progress


def register(app: typer.Typer) -> None:
    """Add this file's commands."""
    app.command()(train)


def train(
    config: Annotated[Path, typer.Argument(help="A recipe, in YAML: docs/training.md.", metavar="CONFIG.yaml")],
    model: Annotated[str | None, typer.Option(help=f"Instead of the recipe's. {MODEL_HELP}")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write, instead of the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on at the newest checkpoint in the folder.")] = False,
    json: JsonOption = False,
) -> None:
    """Train the adapters of a recipe on texts: any method, rule, start and optimizer by name."""
    from lorac.trainer import read_recipe
    from lorac.trainer import train as run

    recipe, places = read_recipe(config)
    host, folder = model or places.get("model"), out or places.get("out")
    for what, given in (("model", host), ("out", folder)):
        if given is None:
            raise OptionError(f"'{config}' has no {what}", next_step=f"add it, or give --{what}")
    with progress("train", recipe.max_steps) as report:
        report.step("loading the model")
        loaded, tokenizer = load_with_tokenizer(str(host))
        if tokenizer is None:
            raise OptionError(
                f"'{host}' has no tokenizer beside it", next_step="save it there: tokenizer.save_pretrained"
            )
        compiled = run(loaded, tokenizer, recipe, Path(str(folder)), resume=resume)
    names = list(compiled.adapters)
    print_report({"folder": str(folder), "adapters": names}, f"{folder}: {', '.join(names)}", as_json=json)
