"""The tests that wait for ``make test-slow``, as ``tiers.toml`` lists them."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Moved:
    """Tests of one file that wait for the long run."""

    test: str
    instead: str
    keep: Sequence[str] = ()

    def takes(self, test: str) -> bool:
        """Return whether a test of the file waits for the long run."""
        matches = fnmatch.fnmatchcase(test.replace("[", "<"), self.test.replace("[", "<"))
        return matches and test.partition("[")[2].removesuffix("]") not in self.keep


def read_moved() -> Mapping[str, list[Moved]]:
    """Return the rows of ``tiers.toml`` by file."""
    tables = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())
    return {file: [Moved(**row) for row in rows] for file, rows in tables.items()}


def mark_slow(items: list[pytest.Item], *, whole: bool) -> None:
    """Mark the tests of ``tiers.toml`` as slow; with the whole suite at hand, refuse a row that takes no test."""
    moved, taken = read_moved(), set()
    for item in items:
        file, _, test = item.nodeid.removeprefix("tests/").partition("::")
        if rows := [row for row in moved.get(file, ()) if row.takes(test)]:
            taken.update((file, row.test) for row in rows)
            item.add_marker(pytest.mark.slow)
    stale = [f"{file}::{row.test}" for file, rows in moved.items() for row in rows if (file, row.test) not in taken]
    if whole and stale:
        raise pytest.UsageError(f"tests/tiers.toml names tests that are not there: {', '.join(stale)}")
