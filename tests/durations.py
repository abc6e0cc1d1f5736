"""Where the suite's time goes, from the report of a run: ``python -m tests.durations build/tests.xml``."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from xml.etree import ElementTree

SHOWN = 40


def read_seconds(file: str) -> dict[tuple[str, str], float]:
    """Return (file, test) -> seconds, with what was set up and torn down for it."""
    cases = ElementTree.parse(file).getroot().iter("testcase")
    return {(case.get("classname", ""), case.get("name", "")): float(case.get("time", 0)) for case in cases}


def print_table(title: str, seconds: Mapping[str, float], counts: Mapping[str, int]) -> None:
    print(f"\n| {title} | s | cases |\n|---|---|---|")
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1])[:SHOWN]:
        print(f"| {name} | {spent:.1f} | {counts[name]} |")


def main(file: str) -> None:
    """Print the seconds of folders, files and tests, the dearest first."""
    cases = read_seconds(file)
    print(f"{len(cases)} tests, {sum(cases.values()):.0f} s in all workers together")
    for title, level in (("folder", 2), ("file", None), ("test", 0)):
        seconds, counts = Counter[str](), Counter[str]()
        for (module, test), spent in cases.items():
            name = f"{module}::{test}" if level == 0 else ".".join(module.split(".")[:level])
            seconds[name] += spent
            counts[name] += 1
        print_table(title, seconds, counts)


if __name__ == "__main__":
    main(sys.argv[1])
