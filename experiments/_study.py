"""The form of an experiment: sides over rates and seeds, the best rate of each, and the verdict.

A figure is the mean over seeds with its standard error. Two sides are compared seed by seed: they separate where the
95 % interval of the mean difference (Student's t) leaves 0 out. A side's best rate is the one with the lowest mean,
found on two other seeds than those that are compared, so that no side is judged by what its rate was chosen by.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lorac.progress import progress
from lorac.third_party_output import suppress_third_party_output

Losses = list[float]
Side = Callable[[float, int, int], Losses]
"""(rate, seed, steps) -> the loss before each step and after the last; what diverges ends in infinities."""
CHOOSING, CHOOSERS = 1000, 2
"""The first of the seeds that rates are chosen on, and how many there are."""
SHOWN, NOT_SHOWN, CONTRARY = "shown", "not shown", "contrary"
# Of 1 to 9 degrees of freedom, two-sided 95 %.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Experiment:
    """A claim of a paper, and how it is tried.

    Attributes:
        claim: in one sentence.
        source: paper or code, and where in it.
        find: settings -> the figures.
        steps: of each run.
        seeds: how many, from 2 to 10.
    """

    claim: str
    source: str
    find: Callable[[argparse.Namespace], Finding]
    steps: int
    seeds: int = 5


@dataclass(frozen=True)
class Table:
    """Scores of several sides.

    Attributes:
        title: of the table.
        what: the scores are.
        scores: side -> its score of each seed, or one that has no seed.
        rates: side -> the rate it was trained at, where rates were searched.
    """

    title: str
    what: str
    scores: Mapping[str, Sequence[float]]
    rates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Expected:
    """A side whose scores the claim says to be below those of another, or below a number.

    Attributes:
        table: the title of the table.
        low: a side of it.
        high: another side of it, or a number.
    """

    table: str
    low: str | float
    high: str | float


@dataclass(frozen=True)
class Finding:
    """The figures of an experiment, and what was expected of them."""

    tables: Sequence[Table]
    expected: Sequence[Expected]

    @property
    def verdict(self) -> str:
        """ "shown" where all that was expected separates, "contrary" where any of it separates the other way."""
        found = [self._judge(one) for one in self.expected]
        if CONTRARY in found:
            return CONTRARY
        return SHOWN if set(found) == {SHOWN} else NOT_SHOWN

    def _judge(self, one: Expected) -> str:
        low, high = interval(*self._pair(one))
        if high < 0:
            return SHOWN
        return CONTRARY if low > 0 else NOT_SHOWN

    def _pair(self, one: Expected) -> tuple[Sequence[float], Sequence[float]]:
        scores = next(table.scores for table in self.tables if table.title == one.table)
        length = max(len(scores[side]) for side in (one.low, one.high) if isinstance(side, str))
        spread = [scores[side] if isinstance(side, str) else [side] for side in (one.low, one.high)]
        low, high = (values if len(values) == length else [*values] * length for values in spread)
        return low, high

    def describe(self) -> str:
        """Return the tables and the verdict as text."""
        lines: list[str] = []
        for table in self.tables:
            lines += ["", f"{table.title}: {table.what}", *_rows(table)]
        lines.append("")
        lines += [self._describe_expected(one) for one in self.expected]
        return "\n".join([*lines, f"verdict: {self.verdict}"])

    def _describe_expected(self, one: Expected) -> str:
        return f"{one.table}: {one.low} below {one.high}? {compared(*self._pair(one))}"


def _rows(table: Table) -> Iterator[str]:
    rates = bool(table.rates)
    yield f"  {'':<34}{'best rate' if rates else '':>10}{'mean':>12} ± standard error"
    for side, scores in table.scores.items():
        rate = f"{table.rates[side]:.3g}" if rates else ""
        yield f"  {side:<34}{rate:>10}{statistics.fmean(scores):>12.4g} ± {error(scores):.2g}"


# ── Sides that are trained, each at its best rate ────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Question:
    """Which sides are held against each other.

    Attributes:
        title: of the table.
        sides: name -> side.
        rates: those that every side is tried at.
        score: losses -> the number that is compared; smaller is better.
        what: what that number is.
        at: a rate to compare all sides at besides each one's best.
    """

    title: str
    sides: Mapping[str, Side]
    rates: Sequence[float]
    score: Callable[[Losses], float]
    what: str
    at: float | None = None


def answer(questions: Sequence[Question], given: argparse.Namespace) -> list[Table]:
    """Run every side at every rate on few seeds, and at its best one on all; return a table for each question."""
    choosers = range(CHOOSING, CHOOSING + min(CHOOSERS, given.seeds))
    runs = sum(len(q.sides) * (len(q.rates) + 1 + (q.at is not None)) for q in questions)
    with progress("experiment", total=runs) as report:

        def scores(question: Question, name: str, rate: float, seeds: Iterable[int]) -> list[float]:
            report.step(f"{question.title}: {name} at {rate:g}")
            return [question.score(question.sides[name](rate, seed, given.steps)) for seed in seeds]

        def best(question: Question, name: str) -> float:
            means = {rate: statistics.fmean(scores(question, name, rate, choosers)) for rate in question.rates}
            return min(means, key=means.__getitem__)

        tables = []
        for question in questions:
            rates = {name: best(question, name) for name in question.sides}
            found = {name: scores(question, name, rate, range(given.seeds)) for name, rate in rates.items()}
            edges = [name for name, rate in rates.items() if rate in {min(question.rates), max(question.rates)}]
            edge = f" (best at the edge of the rates tried: {', '.join(edges)})" if edges else ""
            tables.append(Table(question.title, question.what + edge, found, rates))
            if question.at is not None:
                at = dict.fromkeys(question.sides, question.at)
                found = {name: scores(question, name, question.at, range(given.seeds)) for name in at}
                tables.append(Table(f"{question.title}, at one rate", question.what, found, at))
    return tables


def log_mean(losses: Losses) -> float:
    """Return the mean of log10 of the losses over all steps: how fast they fell, from first to last."""
    return statistics.fmean(math.log10(max(loss, 1e-300)) if math.isfinite(loss) else math.inf for loss in losses[1:])


def last(losses: Losses) -> float:
    """Return the loss after the last step."""
    return losses[-1]


def trained(step: Callable[[int], float], steps: int) -> Losses:
    """Run some steps and return their losses; ``step(i)`` returns the loss before it. A diverged run stays diverged."""
    losses: Losses = []
    for index in range(steps + 1):
        loss = step(index) if not losses or losses[-1] < math.inf else math.inf
        losses.append(loss if math.isfinite(loss) and loss < 1e6 else math.inf)
    return losses


def adamw(parameters: list[torch.Tensor], rate: float) -> Any:
    """Return the optimizer that most papers use, without weight decay."""
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


# ── Statistics ───────────────────────────────────────────────────────────────────────────────────────────────────────
def interval(own: Sequence[float], other: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean difference of two sides, seed by seed; a side that diverges is worst."""
    differences = [a - b for a, b in zip(own, other, strict=True)]
    mean = statistics.fmean(differences)
    if not math.isfinite(mean):
        diverged = tuple(not all(map(math.isfinite, side)) for side in (own, other))
        return {(True, False): (math.inf, math.inf), (False, True): (-math.inf, -math.inf)}.get(
            diverged, (-math.inf, math.inf)
        )
    half = _STUDENT[len(differences) - 2] * error(differences) if len(differences) > 1 else 0.0
    return mean - half, mean + half


def compared(own: Sequence[float], other: Sequence[float]) -> str:
    """Say whether two sides separate, from their scores seed by seed."""
    low, high = interval(own, other)
    if not math.isfinite(low):
        return "diverges"
    said = f"{(low + high) / 2:+.2g} (95 %: {low:+.2g} to {high:+.2g})"
    if low <= 0 <= high:
        return f"{said}: does not separate"
    return f"{said}: {'lower' if high < 0 else 'higher'}"


def error(values: Sequence[float]) -> float:
    """Return the standard error of a mean."""
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) / math.sqrt(len(values)) if all(map(math.isfinite, values)) else math.inf


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────
def main(experiment: Experiment, name: str, text: str | None) -> None:
    """Run the command: ``--seeds``, ``--steps``, ``--smoke``, and ``--json`` for a program that reads the result."""
    parser = argparse.ArgumentParser(
        f"python -m experiments.{name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=experiment.seeds, help="from 2 to 10 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=experiment.steps, help="of each run (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="two seeds and two steps: seconds, and no figures")
    parser.add_argument("--json", type=Path, help="write the tables and the verdict to this file too")
    given = parser.parse_args()
    if given.smoke:
        given.seeds = given.steps = 2
    begun = time.perf_counter()
    torch.set_num_threads(1)
    with suppress_third_party_output():
        found = experiment.find(given)
    seconds = time.perf_counter() - begun
    print(found.describe())
    print(f"{given.seeds} seeds, {given.steps} steps, {seconds:.0f} s")
    if given.json is not None:
        told = {**dataclasses.asdict(found), "verdict": found.verdict, "seconds": round(seconds)}
        given.json.write_text(json.dumps({**told, "seeds": given.seeds, "steps": given.steps}), encoding="utf-8")
