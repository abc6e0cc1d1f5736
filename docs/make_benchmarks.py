"""The page docs/benchmarks.md, made from runs: the tables of every benchmark with what they were measured on.

``python -m docs.make_benchmarks FOLDER`` prints it, of the JSON files of ``python -m benchmarks --json FOLDER``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = """# Benchmarks

Every figure is the median over
processes of the median over rounds, within which all sides take turns in shuffled order; ratios compare sides of one
run. A/A is the base over a second one of the same base: its distance from 1 is what the machine's noise is worth.
"""
FOOT = "*Made by `python -m docs.make_benchmarks FOLDER` from results of `make bench`.*"


def page(folder: Path) -> str:
    """Make the whole page.

    Raises:
        SystemExit: the folder holds no runs.
    """
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    if not runs:
        raise SystemExit(f"no runs in {folder}: python -m benchmarks --json {folder}")
    return "\n".join([HEAD, *(line for run in runs for line in _run(run)), FOOT]) + "\n"


def _run(run: Mapping[str, Any]) -> Iterator[str]:
    """One benchmark: its tables, then what they were measured on and with."""
    yield f"## {run['benchmark']}"
    for table in run["tables"]:
        yield from ("", f"**{table['title']}**", "")
        yield _row(table["columns"])
        yield _row(["---"] * len(table["columns"]))
        yield from (_row(row) for row in table["rows"])
        yield from (line for note in table.get("notes", ()) for line in ("", note))
        if table["A/A"]:
            yield from ("", "A/A: " + ", ".join(f"{what} {ratio:.3f}" for what, ratio in table["A/A"].items()) + ".")
    machine = run["machine"]
    options = ", ".join(f"`{name}={value}`" for name, value in run["options"].items())
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    yield from ("", f"{machine['cpu']}, {machine['cores']} cores; {versions}; {options}; {run['seconds']:.0f} s.", "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    print(page(Path(sys.argv[1])), end="")
