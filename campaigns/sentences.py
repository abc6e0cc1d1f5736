"""Draw sentences out of the pages, the docstrings and the messages of errors, to be read by someone new.

python -m campaigns.sentences [--count N] [--seed N]

A reader marks those that need a second reading; at most 3 of 60 may. Pages that are made from data, code blocks and
tables are left out. The same seed draws the same sentences as long as the texts stand.
"""

from __future__ import annotations

import argparse
import ast
import random
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)
FEWEST = 6
"""Words of a sentence; shorter ones are titles and fragments."""
PARTS = {"page": 20, "docstring": 20, "message": 20}
"""Kind -> its share of sixty."""


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a text whose lines are joined."""
    for one in re.split(r"(?<=[.!?])\s+(?=[A-Z`\"])", " ".join(text.split())):
        if len(one.split()) >= FEWEST:
            yield one


def of_pages() -> Iterator[tuple[str, str]]:
    """Yield place and sentence of the pages that are written by hand."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text(encoding="utf-8")
        if "*Made by `" in text or page.name == "experiments.md":
            continue
        for paragraph in re.split(r"\n\n|\n(?= *(?:-|\d+\.) )", FENCE.sub("", text)):
            if not paragraph.lstrip().startswith(("|", "#", "!", "<")):
                yield from ((str(page.relative_to(ROOT)), one) for one in sentences(paragraph))


def of_docstrings() -> Iterator[tuple[str, str]]:
    """Yield place and sentence of the first paragraph of every docstring of the package."""
    for path, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                place = f"{path}:{getattr(node, 'lineno', 1)}"
                yield from ((place, one) for one in sentences(text.split("\n\n")[0]))


def of_messages() -> Iterator[tuple[str, str]]:
    """Yield place and text of every message that is given to an error or a warning; ``…`` stands for a value."""
    for path, tree in _trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                for value in [*node.exc.args, *(keyword.value for keyword in node.exc.keywords)]:
                    text = _text(value)
                    if len(text.split()) >= FEWEST:
                        yield f"{path}:{node.lineno}", text


def _trees() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted((ROOT / "lorac").rglob("*.py")):
        yield file.relative_to(ROOT), ast.parse(file.read_text(encoding="utf-8"))


def _text(value: ast.expr) -> str:
    """Return the words of a string or of an f-string, and nothing of other expressions."""
    if isinstance(value, ast.Constant):
        return str(value.value) if isinstance(value.value, str) else ""
    if isinstance(value, ast.JoinedStr):
        return "".join(_text(one) or "…" for one in value.values)
    return ""


SOURCES = {"page": of_pages, "docstring": of_docstrings, "message": of_messages}


def draw(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Return (kind, place, sentence) of so many sentences, as many of each kind as ``PARTS`` says."""
    chance = random.Random(seed)
    return [
        (kind, *one)
        for kind, share in PARTS.items()
        for one in chance.sample(list(SOURCES[kind]()), count * share // sum(PARTS.values()))
    ]


def main() -> None:
    """Print the sentences with their numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for number, (kind, place, sentence) in enumerate(draw(given.count, given.seed), 1):
        print(f"{number}. [{kind}] {place}\n   {sentence}")


if __name__ == "__main__":
    main()
