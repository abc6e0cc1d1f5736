"""What mkdocs does to the pages of docs/: lists that are the code's are put in, and links out of the folder turned."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorac
import lorac.errors
from lorac.session.presentation import INTERFACE

ROOT = Path(__file__).parents[1]
LIST = re.compile(r"<!-- every (\w+) -->")
FILE = re.compile(r"<!-- all of ([\w.]+) -->")
TURNED = {"](../CONTRIBUTING.md": "](contributing.md", "](docs/": "]("}
"""Links as they read in the repository -> as they read on the site. CONTRIBUTING.md itself is a page of it."""


def _methods() -> list[str]:
    found = [variant for variant in lorac.variants().values() if variant.__module__.startswith("lorac.variants.")]
    return sorted((f"lorac.{variant.__name__}" for variant in found), key=str.lower)


def _errors() -> list[str]:
    """In the order of the tree."""
    found = vars(lorac.errors).values()
    kinds = [kind for kind in found if isinstance(kind, type) and kind.__module__ == lorac.errors.__name__]
    return [f"lorac.errors.{kind.__name__}" for kind in kinds]


def _compiled() -> list[str]:
    """List the public members of a compiled model."""
    return [
        "lorac.Compiled\n    options:\n      inherited_members: true\n      members:\n"
        + "".join(f"        - {name}\n" for name in INTERFACE)
    ]


LISTS: dict[str, Callable[[], list[str]]] = {"compiled": _compiled, "method": _methods, "error": _errors}


def listed(markdown: str) -> str:
    """Return the page with a directive of mkdocstrings for every member of the lists that it asks for."""
    return LIST.sub(lambda found: "\n\n".join(f"::: {name}" for name in LISTS[found[1]]()), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Expand the lists of a page; mkdocs calls this for every page."""
    markdown = FILE.sub(lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), markdown)
    for link, instead in TURNED.items():
        markdown = markdown.replace(link, instead)
    return listed(markdown)
