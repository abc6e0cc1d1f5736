"""What every experiment shares: sides over rates and seeds, the best rate of each, and whether two sides separate.

A figure is the mean over seeds with its standard error. Two sides are compared seed by seed: they separate where the
95 % interval of the mean difference (Student's t) leaves 0 out. A side's best rate is the one with the lowest mean,
found on other seeds than those that are compared, so that no side is judged by what its rate was chosen by.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lorac.progress import Progress, progress
from lorac.third_party_output import suppress_third_party_output

Losses = list[float]
Side = Callable[[float, int, int], Losses]
"""(rate, seed, steps) -> the loss before each step and after the last; what diverges ends in infinities."""
CHOOSING = 1000
"""The first of the seeds that rates are chosen on."""
# Of 1 to 9 degrees of freedom, two-sided 95 %.
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Question:
    """Which sides are held against which.

    Attributes:
        title: of the table.
        sides: name -> side.
        rates: those that every side is tried at.
        base: what the others are held against.
        score: losses -> the number that is compared; smaller is better.
        what: what that number is.
        at: a rate to compare all sides at besides each one's best.
    """

    title: str
    sides: Mapping[str, Side]
    rates: Sequence[float]
    base: str
    score: Callable[[Losses], float]
    what: str
    at: float | None = None


def settings(text: str | None, name: str, steps: int) -> argparse.Namespace:
    """Parse the command line: ``--seeds``, ``--steps``, ``--smoke``."""
    parser = argparse.ArgumentParser(
        f"python -m experiments.{name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="from 2 to 10 (default: 5)")
    parser.add_argument("--steps", type=int, default=steps, help=f"of each run (default: {steps})")
    parser.add_argument("--smoke", action="store_true", help="two seeds and two steps: seconds, and no figures")
    given = parser.parse_args()
    return argparse.Namespace(seeds=2, steps=2) if given.smoke else given


def answer(questions: Sequence[Question], given: argparse.Namespace) -> None:
    """Run every side at every rate with every seed, and print a table for each question."""
    begun = time.perf_counter()
    torch.set_num_threads(1)
    runs = sum(len(q.sides) * (len(q.rates) + 1 + (q.at is not None)) for q in questions) * given.seeds
    with suppress_third_party_output(), progress("experiment", total=runs) as report:
        answers = [_answer(question, given, report) for question in questions]
    for told in answers:
        print(told)
    print(f"{given.seeds} seeds, {given.steps} steps, {time.perf_counter() - begun:.0f} s")


def _answer(question: Question, given: argparse.Namespace, report: Progress) -> str:
    """Return the table of one question."""

    def scores(name: str, rate: float, first: int) -> list[float]:
        report.step(f"{question.title}: {name} at {rate:g}")
        runs = (question.sides[name](rate, seed, given.steps) for seed in range(first, first + given.seeds))
        return [question.score(losses) for losses in runs]

    def best(name: str) -> float:
        return min(question.rates, key=lambda rate: statistics.fmean(scores(name, rate, CHOOSING)))

    rates = {name: best(name) for name in question.sides}
    found = {name: scores(name, rate, 0) for name, rate in rates.items()}
    lines = [f"\n{question.title}: {question.what}", *_rows(question, found, rates, "best rate")]
    if question.at is not None:
        at = dict.fromkeys(question.sides, question.at)
        lines += _rows(question, {name: scores(name, question.at, 0) for name in at}, at, "equal rate")
    edges = [name for name, rate in rates.items() if rate in {min(question.rates), max(question.rates)}]
    if edges:
        lines.append(f"  best at the edge of the rates tried: {', '.join(edges)}")
    return "\n".join(lines)


def _rows(question: Question, scores: Mapping[str, list[float]], rates: Mapping[str, float], how: str) -> Iterator[str]:
    yield f"  {how:<34}{'rate':>9}{'mean':>11} ± error   against {question.base}"
    for name, own in scores.items():
        verdict = "" if name == question.base else compared(own, scores[question.base])
        yield f"  {name:<34}{rates[name]:>9.3g}{statistics.fmean(own):>11.4g} ± {_error(own):<8.2g}{verdict}"


def compared(own: Sequence[float], other: Sequence[float]) -> str:
    """Whether two sides separate, from their scores seed by seed."""
    differences = [a - b for a, b in zip(own, other, strict=True)]
    mean = statistics.fmean(differences)
    if not math.isfinite(mean):
        return "diverges"
    half = _STUDENT[len(differences) - 2] * _error(differences)
    told = f"{mean:+.2g} (95 %: {mean - half:+.2g} to {mean + half:+.2g})"
    if abs(mean) <= half:
        return f"{told}: does not separate"
    return f"{told}: {'lower' if mean < 0 else 'higher'}"


def _error(values: Sequence[float]) -> float:
    finite = all(map(math.isfinite, values))
    return statistics.stdev(values) / math.sqrt(len(values)) if finite else math.inf


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
