"""Commands about training: train."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from lorac.cli._models import load_image_processor, load_with_tokenizer
from lorac.cli._output import JsonOption, print_report
from lorac.errors import OptionError
from lorac.session.model_folders import MODEL_HELP


def train(
    config: Annotated[Path, typer.Argument(help="A recipe, in YAML: docs/training.md.", metavar="CONFIG.yaml")],
    model: Annotated[str | None, typer.Option(help=f"Instead of the recipe's. {MODEL_HELP}")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write, instead of the recipe's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint.")] = False,
    json: JsonOption = False,
) -> None:
    """Train the adapters of a recipe by TRL or transformers: any method, rule, initialiser and optimizer by name."""
    from lorac.trainer import read_recipe
    from lorac.trainer import train as run

    recipe = read_recipe(config)
    host, folder = model or recipe.model, out or recipe.out
    for field, path in (("model", host), ("out", folder)):
        if path is None:
            raise OptionError(f"'{config}' has no {field}", next_step=f"add it, or give --{field}")
    loaded, processing_class = load_with_tokenizer(str(host))
    if recipe.task == "image-classification":
        processing_class = load_image_processor(str(host))
    if processing_class is None:
        raise OptionError(f"'{host}' has no tokenizer", next_step="save it there: tokenizer.save_pretrained")
    with contextlib.redirect_stdout(sys.stderr):  # trainers print what they log
        names = [*run(loaded, processing_class, recipe, str(folder), resume=resume).adapters]
    print_report({"folder": str(folder), "adapters": names}, f"{folder}: {', '.join(names)}", as_json=json)


COMMANDS = (train,)
