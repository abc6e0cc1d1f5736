"""The figures of an experiment, and a verdict on each line that was expected of them.

A line says that one side is below another. It is *shown* where the 95 % interval of the paired differences lies below
0. Where it lies above, the line is *contrary* if the paper states it; a bar of our own that is missed is "not met".
Nothing here is part of what an experiment computes, so that a change of it leaves the results that are kept.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from experiments._statistics import detectable, error, interval

SHOWN, NOT_SHOWN, CONTRARY, NOT_MET, AT_EDGE = "shown", "not shown", "contrary", "not met", "not judged"
OURS = "us"
FRAGILE = 0.1
"""Of an interval's width: one that ends nearer to 0 may reach it on another processor, whose roundings are others."""


@dataclass(frozen=True)
class Table:
    """Scores of several sides.

    Attributes:
        title: of the table.
        what: the scores are.
        scores: side -> its score of each seed, or one that has no seed.
        rates: side -> the rate it was trained at, where rates were searched.
        edges: sides whose best rate is the lowest or the highest that was tried.
        means: side -> mean and standard error, of a run whose single scores were not kept.
    """

    title: str
    what: str
    scores: Mapping[str, Sequence[float]]
    rates: Mapping[str, float] = field(default_factory=dict)
    edges: Sequence[str] = ()
    means: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, tuple[float, float]]:
        """Side -> the mean of its scores, and its standard error."""
        kept = {side: (mean, spread) for side, (mean, spread) in self.means.items()}
        return kept | {side: (statistics.fmean(own), error(own)) for side, own in self.scores.items()}


@dataclass(frozen=True)
class Expected:
    """A side whose scores the claim says to be below those of another, or below a number.

    Attributes:
        table: the title of the table.
        low: a side of it, or a number.
        high: another side of it, or a number.
        stated_by: the place in the paper that states it; ours, where the paper states it without such a bar, or not.
    """

    table: str
    low: str | float
    high: str | float
    stated_by: str = OURS

    @property
    def key(self) -> str:
        """The line as text."""
        return f"{self.table}: {self.low} below {self.high}"


@dataclass(frozen=True)
class Finding:
    """The figures of an experiment, and what was expected of them.

    Attributes:
        tables: the figures.
        expected: the lines.
        intervals: line -> its interval, of a run whose single scores were not kept.
        seeds: of such a run.
    """

    tables: Sequence[Table]
    expected: Sequence[Expected]
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    seeds: int = 1

    @property
    def verdict(self) -> str:
        """ "shown" where all lines of the paper are, "contrary" where one of them separates the other way.

        Lines of ours decide where the paper states none.
        """
        found = {self.judge(one) for one in self.lines(ours=False) or self.expected}
        return CONTRARY if CONTRARY in found else SHOWN if found == {SHOWN} else NOT_SHOWN

    def lines(self, ours: bool) -> list[Expected]:
        """Return the lines that the paper states, or ours."""
        return [one for one in self.expected if (one.stated_by == OURS) == ours]

    def judge(self, one: Expected) -> str:
        """Return the verdict on a line."""
        if {one.low, one.high} & {side for table in self.tables for side in table.edges}:
            return AT_EDGE
        low, high = self.measure(one)[:2]
        if high < 0:
            return SHOWN
        return NOT_SHOWN if low <= 0 else NOT_MET if one.stated_by == OURS else CONTRARY

    def measure(self, one: Expected) -> tuple[float, float, int]:
        """Return the 95 % interval of a line's difference, low less high, and the number of seeds."""
        if one.key in self.intervals:
            low, high = self.intervals[one.key]
            return low, high, self.seeds if low < high else 1
        scores = next(table.scores for table in self.tables if table.title == one.table)
        pair = [scores[side] if isinstance(side, str) else [side] for side in (one.low, one.high)]
        length = max(map(len, pair))
        own, other = (values if len(values) == length else [*values] * length for values in pair)
        return (*interval(own, other), length)

    def describe(self) -> str:
        """Return the tables, the lines and the verdict as text."""
        lines: list[str] = []
        for table in self.tables:
            lines += ["", f"{table.title}: {table.what}", *_rows(table)]
        lines.append("")
        lines += [self._describe_line(one) for one in self.expected]
        return "\n".join([*lines, f"verdict: {self.verdict}"])

    def _describe_line(self, one: Expected) -> str:
        low, high, seeds = self.measure(one)
        power = detectable(low, high, seeds)
        sees = f"; {seeds} seeds see {power:.2g}" if power else ""
        narrowly = ", narrowly" if low * high > 0 and min(abs(low), abs(high)) < FRAGILE * (high - low) else ""
        return (
            f"{one.key}? {describe_interval(low, high)}: {self.judge(one)}{narrowly} (stated by {one.stated_by}{sees})"
        )


def describe_interval(low: float, high: float) -> str:
    """Return a difference as text."""
    if not math.isfinite(high - low):
        return "one side diverges"
    return f"{(low + high) / 2:+.2g} (95 %: {low:+.2g} to {high:+.2g})"


def _rows(table: Table) -> Iterator[str]:
    rates = bool(table.rates)
    yield f"  {'':<34}{'best rate' if rates else '':>10}{'mean':>12} ± standard error"
    for side, (mean, spread) in table.rows.items():
        rate = f"{table.rates[side]:.3g}" + "*" * (side in table.edges) if side in table.rates else ""
        yield f"  {side:<34}{rate:>10}{mean:>12.4g} ± {spread:.2g}"
    if table.edges:
        yield "  *: the lowest or the highest rate that was tried, so that lines of this side are not judged"
