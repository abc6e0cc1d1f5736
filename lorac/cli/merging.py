"""Commands that put adapters into a model's weights: merge."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from lorac.cli._output import JsonOption, print_report
from lorac.errors import AdapterError

_FOLDER_HELP = "A folder that transformers saved, or diffusers of one model."


@dataclass(frozen=True)
class _WeightedAdapters:
    """The adapters of a command line: name -> path, and name -> weight, 1 where none is given."""

    paths: dict[str, str]
    weights: dict[str, float]

    @classmethod
    def parse(cls, specs: Sequence[str]) -> _WeightedAdapters:
        """Parse adapters given as PATH, PATH=WEIGHT, NAME=PATH or NAME=PATH=WEIGHT.

        Raises:
            AdapterError: two have one name.
        """
        paths: dict[str, str] = {}
        weights: dict[str, float] = {}
        for spec in specs:
            name, path, weight = _split(spec)
            if name in paths:
                raise AdapterError(
                    f"two adapters are called '{name}'",
                    next_step="name them: -a NAME=PATH=WEIGHT",
                    code="adapter_exists",
                )
            paths[name], weights[name] = path, weight
        return cls(paths, weights)


def _split(spec: str) -> tuple[str, str, float]:
    """Return name, path and weight of an adapter; what exists as a whole is a path."""
    rest, weight = spec, 1.0
    if "=" in spec and not Path(spec).exists():
        before, _, last = spec.rpartition("=")
        with contextlib.suppress(ValueError):
            rest, weight = before, float(last)
    name, separator, path = rest.partition("=") if not Path(rest).exists() else ("", "", rest)
    return (name, path, weight) if separator else (Path(rest).stem, rest, weight)


def merge(
    model: Annotated[str, typer.Argument(help=_FOLDER_HELP, metavar="MODEL")],
    adapter: Annotated[
        list[str],
        typer.Option("--adapter", "-a", help="PATH=WEIGHT or NAME=PATH=WEIGHT, weight 1 if none; several times."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.")],
    json: JsonOption = False,
) -> None:
    """Merge adapters into the weights of a model's folder, and write it with its configuration and its tokenizer."""
    from lorac.merging.merged_checkpoint import merge_checkpoint
    from lorac.report.terms import format_size

    given = _WeightedAdapters.parse(adapter)
    made = merge_checkpoint(model, given.paths, out, given.weights)
    mixed = ", ".join(f"{name}*{weight:g}" for name, weight in given.weights.items())
    line = f"{out}: {mixed} merged into {made.merged} tensors; {format_size(made.size)} in all"
    print_report({**dataclasses.asdict(made), "weights": given.weights}, line, as_json=json)


COMMANDS = (merge,)
