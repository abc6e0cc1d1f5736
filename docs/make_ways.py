"""The page docs/ways.md, made from the code: the ways of merging and their options.

``python -m docs.make_ways`` prints it.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator

from lorac.merging import ways
from lorac.merging.way import Way

HEAD = """# Ways of merging

Made by `make docs` from the code; `make check` fails where the two differ. [Merge](merging.md) says how they are used.
Each is a `method=` of `lorac.merge`, and a `merge_method` of a recipe.
"""


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *_ways(), "", "## Options", "", *_options()]) + "\n"


def _ways() -> Iterator[str]:
    yield "| way | what it computes | it reads | options | source |"
    yield "| --- | --- | --- | --- | --- |"
    for name, way in sorted(ways().items()):
        common = {field.name for field in dataclasses.fields(Way)}
        options = ", ".join(f"`{field.name}`" for field in dataclasses.fields(way) if field.name not in common)
        yield f"| `{name}` | {_cell(_summary(way))} | {way().reads} | {options or '–'} | {way.paper} |"


def _options() -> Iterator[str]:
    yield "| option | default | it is | ways |"
    yield "| --- | --- | --- | --- |"
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, way in sorted(ways().items()):
        for field in dataclasses.fields(way):
            row = (field.name, f"`{field.default!r}`", _cell(_meanings(way)[field.name]))
            rows.setdefault(row, []).append(name)
    for (option, default, meaning), owners in rows.items():
        listed = "all" if len(owners) == len(ways()) else ", ".join(f"`{name}`" for name in owners)
        yield f"| `{option}` | {default} | {meaning} | {listed} |"


def _summary(way: type[Way]) -> str:
    """Return the first paragraph of a way's docstring."""
    return " ".join((inspect.getdoc(way) or "").partition("\n\n")[0].split())


def _meanings(way: type[Way]) -> dict[str, str]:
    """Return what the docstrings of a way and its bases say of each option."""
    found: dict[str, str] = {}
    for base in reversed(way.__mro__):
        listed = (base.__doc__ or "").partition("Attributes:")[2]
        for name, text in re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)", listed, re.MULTILINE):
            found[name] = " ".join(text.split())
    return found


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    print(page(), end="")
