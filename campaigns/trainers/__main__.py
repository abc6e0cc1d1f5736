"""Every feature of the page docs/trainers.md, run by ``lorac train`` on tiny models, or seen to be refused.

python -m campaigns.trainers run [--only WORDS]
python -m campaigns.trainers page > docs/trainers.md
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import yaml

from campaigns.trainers.features import ABSENT, FOR_GPUS, REFUSED, THERE, Feature

HEAD = """# Compared with other trainers

[Train](training.md) says how a recipe is used. Each row was run, or seen to be refused, by
`python -m campaigns.trainers run`: a tiny model, two steps. A name in Axolotl or LLaMA-Factory is a field of its YAML
file, in TRL a class or an argument.
"""
FOOT = "*Made by `python -m campaigns.trainers page` from the features that `python -m campaigns.trainers run` runs.*"
TITLES = "| feature | Axolotl | LLaMA-Factory | TRL | here |\n| --- | --- | --- | --- | --- |"


def format_feature(feature: Feature) -> str:
    """Return a row of the table: a feature, its names, and what was run."""
    fields = yaml.safe_dump({**feature.recipe}, default_flow_style=True, sort_keys=False, width=10_000).strip()
    calls = [f"`lorac train {' '.join(options)}`".replace(" `", "`") for options in feature.calls if options]
    shown = [*([f"`{fields[1:-1]}`"] if feature.recipe else []), *calls]
    if feature.processes > 1:
        shown.append("by `torchrun`")
    if feature.needs is not None:
        shown.append(f"where {feature.needs} is installed")
    cells = (
        feature.name,
        feature.axolotl or "–",
        feature.factory or "–",
        feature.trl or "–",
        "; ".join(shown) or "as it is",
    )
    return " | ".join(("", *cells, "")).strip()


def page() -> Iterator[str]:
    """Yield the lines of the page."""
    yield HEAD
    for title, features in THERE.items():
        yield from (f"## {title}", "", TITLES, *map(format_feature, features), "")
    yield from ("## Refused by name", "", TITLES, *map(format_feature, REFUSED), "")
    yield from ("## For GPUs", "", "Not run here, where there is none.", "", "| feature | here |", "| --- | --- |")
    yield from (f"| {name} | {field} |" for name, field in FOR_GPUS.items())
    yield from ("", "## Without a field", "", *(f"- {name}" for name in ABSENT), "", FOOT)


def run(only: str | None) -> bool:
    """Run the features, print a table, and return whether each ended as the page says."""
    from campaigns.trainers.work import run as run_feature
    from campaigns.trainers.work import work_folder

    ends = Counter[str]()
    with tempfile.TemporaryDirectory() as made, work_folder(Path(made)) as folder:
        for number, feature in enumerate((*itertools.chain(*THERE.values()), *REFUSED)):
            if only is None or only in feature.name:
                end = run_feature(feature, number, folder)
                ends[end.partition(":")[0]] += 1
                print(f"{feature.name:50} {end}", flush=True)
    print(", ".join(f"{number} {end}" for end, number in sorted(ends.items())))
    return not ends["WRONG"]


def main() -> None:
    """Run the features, or print the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=["run", "page"])
    parser.add_argument("--only", help="words of the features' names")
    given = parser.parse_args()
    if given.action == "page":
        print("\n".join(page()))
    elif not run(given.only):
        sys.exit(1)


if __name__ == "__main__":
    main()
