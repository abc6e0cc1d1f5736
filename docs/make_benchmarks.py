"""The page docs/benchmarks.md, made from runs: the tables of every benchmark with what they were measured on.

``python -m docs.make_benchmarks`` prints it, of the files in benchmarks/results, which ``make bench`` writes;
``--quote`` puts figures of it into the pages that quote them, and ``--age`` prints which tables are older than their
rooms.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
HEAD = """# Benchmarks

Every figure is the median over
processes of the median over rounds, within which all sides take turns in shuffled order; ratios compare sides of one
run. A/A is the base over a second one of the same base: its distance from 1 is what the machine's noise is worth.
"""
FOOT = "*Made by `make bench` from its results; `make check` says which tables are older than the code they measure.*"
LIVE, FUSED, PEFT = "live LoRA (ONNX Runtime)", "fused LoRA (ONNX Runtime)", "PEFT unmerge + merge"
QUOTES = {
    "README.md": (r"^\| swapping a rank-16 LoRA.*$", (LIVE, FUSED, PEFT)),
    "docs/index.md": (r"^A rank-16 LoRA of a 20-layer Llama.*$", (LIVE, PEFT)),
}
"""Page -> a line of it, and the swaps whose milliseconds it quotes, in its order."""
MILLISECONDS = re.compile(r"[\d.]+(?= ms)")


def runs(folder: Path) -> list[dict[str, Any]]:
    """Return the runs of a folder in the order of their benchmarks' names.

    Raises:
        SystemExit: the folder holds no runs.
    """
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))]
    if not found:
        raise SystemExit(f"no runs in {folder}: make bench")
    return found


def page(folder: Path) -> str:
    """Make the whole page."""
    return "\n".join([HEAD, *(line for run in runs(folder) for line in _run(run)), FOOT]) + "\n"


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
    at = f"Revision `{run['revision']}`; {machine['cpu']}, {machine['cores']} cores; {versions}; {options}"
    yield from ("", f"{at}; {run['seconds']:.0f} s.", "")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def quote(page: str, text: str, folder: Path) -> str:
    """Return the text of a page that quotes swaps, with the figures of the last run."""
    line, sides = QUOTES[page]
    (swap,) = (run for run in runs(folder) if run["benchmark"] == "swap")
    measured = {side: milliseconds for side, milliseconds, *_ in swap["tables"][0]["rows"]}
    figures = iter([measured[side] for side in sides])
    return re.sub(line, lambda found: MILLISECONDS.sub(lambda _: next(figures), found[0]), text, flags=re.MULTILINE)


def ages(folder: Path) -> Mapping[str, str]:
    """Return benchmark -> a sentence, for those whose rooms have commits that their runs have not.

    A checkout without its history, or without git, knows of none.
    """
    found = {}
    for run in runs(folder):
        command = ["git", "rev-list", f"{run['revision']}".rstrip("+") + "..HEAD", "--", *run["rooms"]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if later := done.stdout.split():
            rooms = ", ".join(f"`{room}`" for room in run["rooms"])
            found[run["benchmark"]] = f"Older than the code: later commits ({len(later)}) touch {rooms}."
    return found


def mark(text: str, folder: Path) -> str:
    """Return the page with the ages of its tables."""
    for name, sentence in ages(folder).items():
        text = text.replace(f"\n## {name}\n", f"\n## {name}\n\n*{sentence}*\n")
    return text


if __name__ == "__main__":
    if "--age" in sys.argv:
        for name, sentence in ages(RESULTS).items():
            print(f"docs/benchmarks.md, {name}: {sentence}")
    elif "--quote" in sys.argv:
        for name in QUOTES:
            text = (ROOT / name).read_text(encoding="utf-8")
            (ROOT / name).write_text(quote(name, text, RESULTS), encoding="utf-8")
    else:
        print(page(RESULTS), end="")
