"""Run every experiment, a process each, and write docs/experiments.md and the figures beside it.

    python -m experiments [NAME ...] [--again] [--page] [--jobs 2]
    python -m experiments --faults [NAME ...]

Results are kept in experiments/results until the code that computes them changes (`experiments._kept`), so that a run
that was stopped goes on; --again runs it anew, --page only writes the page from what is there. With names the page
stays as it is. --faults runs each experiment with a line of its method taken out, on three seeds, or on all where three
do not show the claim without the fault either: a set-up that still shows its claim shows nothing of the method.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import pkgutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import experiments
from experiments._finding import CONTRARY, SHOWN, Finding, Table
from experiments._kept import RESULTS, ROOT, digest
from experiments._study import Experiment

PAGE, PICTURES = ROOT / "docs/experiments.md", ROOT / "docs/pictures/experiments"
NAMES = [found.name for found in pkgutil.iter_modules(experiments.__path__) if not found.name.startswith("_")]
FAULTS, FAULT_SEEDS, SLOW = RESULTS / "faults", 3, 900
HEAD = """# What the papers claim, tried here

Each row is one experiment of minutes on two cores: a claim of a paper, tried with several seeds, every side trained at
its own best rate, which is found on two other seeds and lies between two that are worse. The claim is a list of lines,
each of one side below another, and each says who states it: a place in the paper, or us, where the paper states it
without such a bar. A line is *shown* where the 95 % interval of the paired differences lies below 0; "5 seeds see d"
is the difference that five seeds, spread as these, would tell from none four times out of five. A line that is shown
*narrowly* may not be on another processor. The verdict is of the lines that the paper states. *Shown*: all of them are.
*Not shown*: some are not. *Contrary*: one separates the other way. Lines of ours say how far the claim goes here; they
are counted beside it, and decide only where the paper states none. The tasks are small, so that a claim that is not
shown here may well hold where the paper says it does; unless its text says more, the rates, seeds and steps of its
tables are all that was tried. Seconds are those of one run beside others.

`make experiments` runs them all and writes this page, and that of the [families of methods](taxonomy.md);
`python -m experiments.<name>` runs one and prints its tables. `python -m experiments --faults` runs those that have a
fault to put in, a line of the method that is taken out: with it the claim must not be shown.

To try your own variation: copy a file of `experiments/`, change the sides of its question (a side is a function of
rate, seed and steps that returns losses), say in `EXPECTED` which side the claim says to be lower, and run it by its
name. `--smoke` runs it in seconds, without figures worth reading.

| experiment | claim | verdict | the paper's lines | ours | figure | seconds |
| --- | --- | --- | --- | --- | --- | --- |
"""


def load(name: str) -> Experiment:
    """Return an experiment by its module's name."""
    return importlib.import_module(f"experiments.{name}").EXPERIMENT


def kept(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """Return the result of an experiment as it is now, if it was run."""
    path = folder / f"{name}.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return result if result.get("digest") == _digest(name, folder) else None


def _digest(name: str, folder: Path) -> str:
    return digest(name, "fault") if folder == FAULTS else digest(name)


def run(name: str, folder: Path = RESULTS) -> bool:
    """Run an experiment in a process of its own, print what it found, and keep its result."""
    folder.mkdir(parents=True, exist_ok=True)
    path, now = folder / f"{name}.json", _digest(name, folder)
    part = path.with_suffix(".part")
    command = [sys.executable, "-m", f"experiments.{name}", "--json", part]
    if folder == FAULTS:
        command += ["--fault", "--seeds", str(_fault_seeds(name))]
    done = subprocess.run(command, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    print(f"\n── {name} ──\n{done.stdout}", flush=True)
    if done.returncode:
        return False
    result = {"digest": now, **json.loads(part.read_text(encoding="utf-8"))}
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.unlink()
    return True


def _fault_seeds(name: str) -> int:
    """Return how many seeds a fault is tried on: few, unless so few do not show the claim without the fault."""
    whole = kept(name)
    if whole is None or "intervals" in whole or find(name, first_seeds(whole, FAULT_SEEDS)).verdict == SHOWN:
        return FAULT_SEEDS
    return whole["seeds"]


def first_seeds(result: Mapping[str, Any], seeds: int) -> dict[str, Any]:
    """Return the result of so many seeds."""
    tables = [
        {**table, "scores": {side: own[:seeds] for side, own in table["scores"].items()}} for table in result["tables"]
    ]
    return {**result, "tables": tables}


def find(name: str, result: Mapping[str, Any]) -> Finding:
    """Return the figures of a result, with the lines that are expected now."""
    expected = importlib.import_module(f"experiments.{name}").EXPECTED
    tables = [Table(**table) for table in result["tables"]]
    expected = [one for one in expected if one.table in {table.title for table in tables}]  # few steps, fewer tables
    return Finding(tables, expected, result.get("intervals", {}), result["seeds"])


def row(name: str, result: Mapping[str, Any]) -> str:
    """Return the row of the page."""
    found = find(name, result)
    figure = f"[figure](pictures/experiments/{name}.svg)"
    counts = " | ".join(_count(found, ours) for ours in (False, True))
    return f"| `{name}` | {_claim(name)} | {found.verdict} | {counts} | {figure} | {result['seconds']} |"


def _count(found: Finding, ours: bool) -> str:
    lines = found.lines(ours)
    return f"{sum(found.judge(one) == SHOWN for one in lines)} of {len(lines)}" if lines else "none"


def _claim(name: str) -> str:
    experiment = load(name)
    return f"{experiment.claim} ({experiment.source})"


def details(name: str, result: Mapping[str, Any]) -> str:
    """Return the section of the page with the tables."""
    experiment, text = load(name), find(name, result).describe().strip()
    told = [_question(name)]
    if experiment.fails_by:
        told.append(f"This set-up could have failed by {experiment.fails_by}.")
    if experiment.fault is not None:
        told.append(_describe_fault(name, experiment.fault.text))
    if "intervals" in result:
        told.append("Means and intervals are those of an earlier run of the same code, whose single scores are lost.")
    if "note" in result:
        told[-1] += f" {result['note']}"
    told.append(f"```text\n{text}\n{result['seeds']} seeds, {result['steps']} steps\n```")
    return "\n\n".join([f"## {name}", *told]) + "\n"


def _describe_fault(name: str, text: str) -> str:
    """Say which line of the method is taken out, and whether the claim is shown then, and on as few seeds with it."""
    result, whole = kept(name, FAULTS), kept(name)
    if result is None:
        return f"A fault to put in: {text}."
    found = (
        f"A fault that was put in: {text}. On {result['seeds']} seeds the claim is then {find(name, result).verdict}"
    )
    if whole is None or "intervals" in whole:
        return f"{found}."
    return f"{found}, and on as many without the fault {find(name, first_seeds(whole, result['seeds'])).verdict}."


def _question(name: str) -> str:
    """Return the first sentence of a module, and how it was set up."""
    text = importlib.import_module(f"experiments.{name}").__doc__ or ""
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if not part.startswith("    ")]
    return "\n\n".join(paragraphs)


def draw(name: str, found: Finding) -> None:
    """Draw each line's difference with its interval: green left of 0 where it is shown, red where it is contrary."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": name, "svg.fonttype": "none"})  # the same figures give the same file
    titles = list(dict.fromkeys(one.table for one in found.expected))
    groups = [[one for one in found.expected if one.table == title] for title in titles]
    heights = [0.35 * len(group) + 0.9 for group in groups]
    figure = Figure(figsize=(8, sum(heights) + 0.3), layout="constrained")
    figure.suptitle(f"{name}: {found.verdict}", fontsize=11, x=0.02, ha="left")
    axes = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, title, group in zip(axes, titles, groups, strict=True):
        for place, one in enumerate(group):
            low, high, _ = found.measure(one)
            colour = {SHOWN: "#2e8b57", CONTRARY: "#c0392b"}.get(found.judge(one), "#888888")
            if math.isfinite(high - low):
                middle = (low + high) / 2
                axis.errorbar(middle, place, xerr=middle - low, fmt="o", color=colour, capsize=3, markersize=5)
        axis.set_yticks(range(len(group)), [f"{one.low} below {one.high}" for one in group], fontsize=8)
        axis.set_ylim(len(group) - 0.5, -0.5)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("difference, with its 95 % interval; the claim says below 0", fontsize=8)
    PICTURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})


def write_page() -> None:
    """Write the page and the figures of all results that are kept."""
    results = {name: result for name in NAMES if (result := kept(name)) is not None}
    for name, result in results.items():
        draw(name, find(name, result))
    rows = [
        row(name, results[name]) if name in results else f"| `{name}` | {_claim(name)} | to be run anew | | | | |"
        for name in NAMES
    ]
    slow = [f"`{name}`" for name, result in results.items() if result["seconds"] > SLOW]
    hours = sum(result["seconds"] for result in results.values()) / 3600
    rows.append(
        f"\nAll of them took {hours:.1f} hours of a core, and more than {SLOW} seconds each of {', '.join(slow)}."
    )
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
    parser.add_argument("--faults", action="store_true", help="run the experiments with a line taken out instead")
    given = parser.parse_args()
    folder, able = RESULTS, NAMES
    if given.faults:
        folder, able = FAULTS, [name for name in NAMES if load(name).fault is not None]
    wanted = [name for name in given.names or able if name in able]
    names = [] if given.page else [name for name in wanted if given.again or kept(name, folder) is None]
    with ThreadPoolExecutor(given.jobs) as pool:
        failed = [
            name for name, done in zip(names, pool.map(run, names, [folder] * len(names)), strict=True) if not done
        ]
    if given.faults:
        results = {name: result for name in wanted if (result := kept(name, FAULTS)) is not None}
        still = [name for name, result in results.items() if find(name, result).verdict == SHOWN]
        print(
            f"{len(results) - len(still)} claims fail with a line taken out; still shown: {', '.join(still) or 'none'}"
        )
        return int(bool(failed or still))
    if not given.names:
        write_page()
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
