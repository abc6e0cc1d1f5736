"""The page docs/ways.md, made from the code: the ways of merging and their options.

``python -m docs.make_ways`` prints it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from docs.foot import FOOT
from lorac.merging import ways
from lorac.merging.registry import option_defaults
from lorac.merging.way import Way

HEAD = """# Ways of merging

[Merge](merging.md) says how they are used.
Each is a `method=` of `lorac.merge`, and a `merge_method` of a recipe; `knots`
and `core` are short for `ties` in that space.
"""
COMMON = option_defaults(Way)  # type: ignore[type-abstract]  # its fields alone are read


def page() -> str:
    """Return the whole page."""
    return "\n".join([HEAD, *_ways(), "", "## Options", "", *_options(), "", FOOT]) + "\n"


def _ways() -> Iterator[str]:
    yield "| way | what it computes | it reads | options | source |"
    yield "| --- | --- | --- | --- | --- |"
    for name, way in sorted(ways().items()):
        options = ", ".join(f"`{option}`" for option in option_defaults(way) if option not in COMMON)
        yield f"| `{name}` | {_cell(_summary(way))} | {way().reads} | {options or '–'} | {way.paper} |"


def _options() -> Iterator[str]:
    yield "| option | default | it is | ways |"
    yield "| --- | --- | --- | --- |"
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name, way in sorted(ways().items()):
        for option, default in option_defaults(way).items():
            row = (option, f"`{default!r}`", _cell(_meanings(way)[option]))
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
