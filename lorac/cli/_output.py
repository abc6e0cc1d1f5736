"""The output of commands: reports as tables that fit the terminal, or as JSON."""

import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorac.errors import LoracError, escape_controls

SHOWS_ALL = "--traceback"
"""The option that shows where an error comes from, and the messages of libraries."""
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]

_ARGUMENT = re.compile(r"\b([a-z_]+)=(?![\[{(])('[^']*'|\"[^\"]*\"|[\w.…]+)?")
"""An argument of a call in Python, with a value that is not a list, mapping or call."""
_CALLS = {
    "load_adapter(path, model)": "give --model",
    "save_adapter(adapter, path, format='gguf', model=model)": "give --model",
    "lorac.to_lora(adapter, model, rank=…)": "`lorac convert --model MODEL --rank RANK`",
    "lorac.to_lora(adapter, model)": "`lorac convert --model MODEL`",
    "lorac.load_adapter(path, model, fix_names=True)": "`lorac convert ADAPTER OUT --model MODEL --fix-names`",
    "import its module": "give --import MODULE",
    "give it in adapters=, or add it by add_adapter(source, name=...)": (
        "`lorac inspect FOLDER` lists the adapters; `lorac compile MODEL -o FOLDER -a NAME=PATH` takes others"
    ),
    "give its path to lorac.compile(model, adapters), or read it by lorac.load_adapter(path)": (
        "`lorac inspect ADAPTER` reads it; `lorac compile MODEL -a ADAPTER -o FOLDER` makes a folder with it"
    ),
    "lorac.load(folder) runs it, with its adapters in it": "`lorac inspect FOLDER` shows it, with its adapters",
    "write the module names out, as a list": "write the names of modules, as q_proj,v_proj",
    "adapter '(command line)' targets": "--targets is",
}
"""Words of an error in Python -> the same on the command line."""
_UNLIMITED_WIDTH = 1_000_000
"""Columns where the output is not a terminal, so that nothing is cut or wrapped."""


def complete_names(module: str, attribute: str) -> Callable[[], list[str]]:
    """Return a completion of names, which a module's table or function gives; the module is imported on demand."""

    def complete() -> list[str]:
        found = getattr(importlib.import_module(module), attribute)
        return list(found() if callable(found) else found)

    return complete


def make_table(headers: Iterable[str], rows: Iterable[Iterable[object]]) -> Table:
    """Return a table; long cells wrap, and markup in them is printed literally."""
    made = Table()
    for header in headers:
        made.add_column(header, overflow="fold")
    for row in rows:
        made.add_row(*(Text(escape_controls(str(cell))) for cell in row))
    return made


def print_report(report: object, *parts: Table | str, as_json: bool) -> None:
    """Print a report.

    Args:
        report: the data for JSON: mappings, sequences, dataclasses.
        parts: the same data for people, in order.
        as_json: whether to print JSON.
    """
    if as_json:
        text = json.dumps(report, indent=1, default=_to_json, ensure_ascii=False)
        if escape_controls(text) != text:  # JSON escapes fewer characters than terminals obey
            text = json.dumps(report, indent=1, default=_to_json)
        print(text)
        return
    console = Console(width=None if sys.stdout.isatty() else _UNLIMITED_WIDTH)
    for part in parts:
        console.print(Text(escape_controls(part)) if isinstance(part, str) else part)


def format_number(value: object) -> str:
    """Return a value as the cell of a table: numbers with three digits, nothing for None."""
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def format_error(error: LoracError) -> str:
    """Return the text of an error."""
    return f"lorac.{type(error).__name__}: {error}"


def name_options(step: str, words: Sequence[str], options: Mapping[str, Collection[str]]) -> str:
    """Return an error's text with options in place of arguments of Python.

    Args:
        step: the text, or its next step.
        words: the words of the command line.
        options: command -> its options; the options of the running command and of commands in ``step`` are used.
    """
    for call, instead in _CALLS.items():
        step = step.replace(call, instead)
    commands = [next((word for word in words if word in options), ""), *re.findall(r"\w+", step)]
    known = {option for command in commands for option in options.get(command, ())}

    def name_option(found: re.Match[str]) -> str:
        option, value = f"--{found[1].replace('_', '-')}", (found[2] or "").strip("'\"")
        return found[0] if option not in known else option if value in {"", "True", "…"} else f"{option} {value}"

    return _ARGUMENT.sub(name_option, step)


def reword(message: str, group: Any) -> str:
    """Return an error's message in the words of the command line that runs, one of a group's commands."""
    options = {name: {text for one in command.params for text in one.opts} for name, command in group.commands.items()}
    return name_options(message, sys.argv[1:], options)


def _to_json(value: object) -> object:
    """Convert dataclasses, other mappings and sets for JSON; anything else becomes text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
