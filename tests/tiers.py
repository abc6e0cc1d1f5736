"""The tests that wait for a longer run: ``slow.toml`` and ``medium.toml`` list them, and the markers select."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

TIERS = ("slow", "medium")


@dataclass(frozen=True)
class Moved:
    """Tests of one file that wait for a longer run."""

    test: str
    instead: str
    keep: Sequence[str] = ()

    def takes(self, test: str) -> bool:
        """Return whether a test of the file waits for that run."""
        case = test.partition("[")[2].removesuffix("]")
        return _matches(test, self.test) and not any(_matches(case, kept) for kept in self.keep)


def _matches(text: str, pattern: str) -> bool:
    """Return whether a text is as a pattern, in which * alone stands for other characters."""
    return fnmatch.fnmatchcase(text.replace("[", "<"), pattern.replace("[", "<"))


def read_moved(tier: str) -> Mapping[str, list[Moved]]:
    """Return the rows of a tier by file."""
    tables = tomllib.loads(Path(__file__).with_name(f"{tier}.toml").read_text())
    return {file: [Moved(**row) for row in rows] for file, rows in tables.items()}


class StaleRows(pytest.Item):
    """A test that fails for rows that take no test: a worker of xdist can say so only by a test's failure."""

    def __init__(self, rows: Sequence[str], **kwargs: object) -> None:
        super().__init__(**kwargs)  # type: ignore[arg-type]  # pytest's own arguments
        self.rows = rows

    def runtest(self) -> None:
        pytest.fail(f"{self.name} names tests that are not there: {', '.join(self.rows)}", pytrace=False)


def mark_tiers(session: pytest.Session, items: list[pytest.Item], *, whole: bool) -> None:
    """Mark the tests of each tier's list; of the whole suite, add a test that fails for rows that take none."""
    for tier in TIERS:
        stale = _mark(items, tier)
        if whole and stale:
            items.append(StaleRows.from_parent(session, name=f"tests/{tier}.toml", rows=stale))


def _mark(items: Sequence[pytest.Item], tier: str) -> list[str]:
    """Mark the tests that a tier's list takes; return the rows that take none."""
    moved, taken = read_moved(tier), set()
    for item in items:
        file, _, test = item.nodeid.removeprefix("tests/").partition("::")
        if rows := [row for row in moved.get(file, ()) if row.takes(test)]:
            taken.update((file, row.test) for row in rows)
            item.add_marker(getattr(pytest.mark, tier))
    return [f"{file}::{row.test}" for file, rows in moved.items() for row in rows if (file, row.test) not in taken]
