"""Run every experiment, a process each, and write docs/experiments.md and the figures beside it.

    python -m experiments [NAME ...] [--again] [--page] [--jobs 2]

What was run is kept in .cache/experiments until its code or that of the files it shares changes, so that a run that
was stopped goes on; --again runs it anew, --page only writes the page from what is there. With names the page stays as
it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import experiments
from experiments._kept import KEPT, digest
from experiments._study import Experiment, Finding, Table, error

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURES = ROOT / "docs/experiments.md", ROOT / "docs/pictures/experiments"
NAMES = [found.name for found in pkgutil.iter_modules(experiments.__path__) if not found.name.startswith("_")]
HEAD = """# What the papers claim, tried here

Each row is one experiment of minutes on two cores: a claim of a paper, tried with several seeds, every side trained at
its own best rate, which is found on two other seeds. *Shown*: all that the claim says separates by the 95 % interval
of the paired differences. *Not shown*: some of it does not. *Contrary*: some of it separates the other way. The tasks
are small, so that a claim that is not shown here may well hold where the paper says it does; unless its text says more,
the rates, seeds and steps of its tables are all that was tried. Seconds are those of one run beside others.

`make experiments` runs them all and writes this page, and that of the [families of methods](taxonomy.md);
`python -m experiments.<name>` runs one and prints its tables.

To try your own variation: copy a file of `experiments/`, change the sides of its question (a side is a function of
rate, seed and steps that returns losses), say in `EXPECTED` which side the claim says to be lower, and run it by its
name. `--smoke` runs it in seconds, without figures worth reading.

| experiment | claim | verdict | figure | seconds |
| --- | --- | --- | --- | --- |
"""


def load(name: str) -> Experiment:
    """Return an experiment by its module's name."""
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def kept(name: str) -> dict[str, Any] | None:
    """Return the result of an experiment as it is now, if it was run."""
    path = KEPT / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result if result.get("digest") == digest(name) else None


def run(name: str) -> bool:
    """Run an experiment in a process of its own, print what it found, and keep its result."""
    KEPT.mkdir(parents=True, exist_ok=True)
    path, now = KEPT / f"{name}.json", digest(name)
    part = path.with_suffix(".part")
    command = [sys.executable, "-m", f"experiments.{name}", "--json", part]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    print(f"\n── {name} ──\n{done.stdout}", flush=True)
    if done.returncode:
        return False
    path.write_text(json.dumps({"digest": now, **json.loads(part.read_text(encoding="utf-8"))}), encoding="utf-8")
    part.unlink()
    return True


def row(name: str, result: Mapping[str, Any]) -> str:
    """Return the row of the page."""
    experiment = load(name)
    claim = f"{experiment.claim} ({experiment.source})"
    figure = f"[figure](pictures/experiments/{name}.svg)"
    return f"| `{name}` | {claim} | {result['verdict']} | {figure} | {result['seconds']} |"


def details(name: str, result: Mapping[str, Any]) -> str:
    """Return the section of the page with the tables."""
    tables = [Table(**table) for table in result["tables"]]
    found = Finding(tables, [_expected(one) for one in result["expected"]])
    text = f"{found.describe()}\n{result['seeds']} seeds, {result['steps']} steps".strip()
    return f"## {name}\n\n{_question(name)}\n\n```text\n{text}\n```\n"


def _expected(told: Mapping[str, Any]) -> Any:
    from experiments._study import Expected

    return Expected(**told)


def _question(name: str) -> str:
    """Return the first sentence of a module, and how it was set up."""
    text = importlib.import_module(f"experiments.{name}").__doc__ or ""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if not part.startswith("    ")]
    return "\n\n".join(paragraphs)


def draw(name: str, tables: Sequence[Table]) -> None:
    """Draw an experiment's tables: a bar for each side, with the standard error over seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none"})  # the same figures give the same file
    heights = [0.35 * len(table.scores) + 0.9 for table in tables]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    axes = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, table in zip(axes, tables, strict=True):
        means = [sum(scores) / len(scores) for scores in table.scores.values()]
        axis.barh(list(table.scores), means, xerr=[error(scores) for scores in table.scores.values()], color="#7a9cc6")
        axis.invert_yaxis()
        axis.set_title(table.title, fontsize=9, loc="left")
        axis.set_xlabel(table.what, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


def write_page() -> None:
    """Write the page and the figures of all results that are kept."""
    results = {name: result for name in NAMES if (result := kept(name)) is not None}
    for name, result in results.items():
        draw(name, [Table(**table) for table in result["tables"]])
    missing = [name for name in NAMES if name not in results]
    rows = [row(name, result) for name, result in results.items()]
    rows += [f"| `{name}` | {load(name).claim} ({load(name).source}) | not run | | |" for name in missing]
    sections = [details(name, result) for name, result in results.items()]
    PAGE.write_text(HEAD + "\n".join(rows) + "\n\n" + "\n".join(sections), encoding="utf-8")


def main() -> int:
    """Run what is asked for; return 1 if any of it failed."""
    parser = argparse.ArgumentParser(
        "python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], metavar="NAME", help="of experiments (default: all)")
    parser.add_argument("--again", action="store_true", help="run those that were run, too")
    parser.add_argument("--page", action="store_true", help="run nothing")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, of one thread each (default: %(default)s)")
    given = parser.parse_args()
    names = [] if given.page else [name for name in given.names or NAMES if given.again or kept(name) is None]
    with ThreadPoolExecutor(given.jobs) as pool:
        failed = [name for name, done in zip(names, pool.map(run, names), strict=True) if not done]
    if not given.names:
        write_page()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
