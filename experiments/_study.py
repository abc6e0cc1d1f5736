"""The form of an experiment: sides over rates and seeds, the best rate of each, and the command that runs it.

A side's best rate is the one with the lowest mean, found on two other seeds than those that are compared, so that no
side is judged by what its rate was chosen by. Where it is the lowest or the highest of those tried, further ones are.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments._finding import Finding, Table
from lorac.progress import progress
from lorac.third_party_output import suppress_third_party_output

Losses = list[float]
Side = Callable[[float, int, int], Losses]
"""(rate, seed, steps) -> the loss before each step and after the last; what diverges ends in infinities."""
CHOOSING, CHOOSERS = 1000, 2
"""The first of the seeds that rates are chosen on, and how many there are."""


WIDER = 4
"""How many further rates a side is tried at, at most, while its best one is the lowest or the highest."""


@dataclass(frozen=True)
class Fault:
    """A method without one of its lines.

    Attributes:
        text: says which one, as a sentence does after "without it:".
        put: puts the fault in, and takes it out at the end of the context.
    """

    text: str
    put: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Experiment:
    """A claim of a paper, and how it is tried.

    Attributes:
        claim: in one sentence.
        source: paper or code, and where in it.
        find: settings -> the figures.
        steps: of each run.
        seeds: how many, from 2 to 10.
        first: the first of the seeds, where others were looked at while the set-up was made.
        fails_by: ends the sentence "this set-up could have failed by …".
        fault: a line of the method taken out, with which the claim must not be shown.
    """

    claim: str
    source: str
    find: Callable[[argparse.Namespace], Finding]
    steps: int
    seeds: int = 5
    first: int = 0
    fails_by: str = ""
    fault: Fault | None = None


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

        def best(question: Question, name: str) -> tuple[float, bool]:
            rates, means = sorted(question.rates), dict[float, float]()
            wider = WIDER if len(rates) > 1 and not given.smoke else 0
            while True:
                means |= {r: statistics.fmean(scores(question, name, r, choosers)) for r in rates if r not in means}
                found = min(means, key=means.__getitem__)
                is_edge = len(rates) > 1 and found in {rates[0], rates[-1]}
                if not is_edge or not wider:
                    return found, is_edge and not given.smoke
                wider -= 1
                next_one = rates[1] if found == rates[0] else rates[-2]
                rates = sorted([*rates, found**2 / next_one])

        tables = []
        for question in questions:
            chosen = {name: best(question, name) for name in question.sides}
            rates = {name: rate for name, (rate, _) in chosen.items()}
            edges = [name for name, (_, is_edge) in chosen.items() if is_edge]
            found = {name: scores(question, name, rate, deciding(given)) for name, rate in rates.items()}
            tables.append(Table(question.title, question.what, found, rates, edges))
            if question.at is not None:
                at = dict.fromkeys(question.sides, question.at)
                found = {name: scores(question, name, question.at, deciding(given)) for name in at}
                tables.append(Table(f"{question.title}, at one rate", question.what, found, at))
    return tables


def deciding(given: argparse.Namespace) -> range:
    """Return the seeds that decide."""
    return range(given.first, given.first + given.seeds)


def fewer(given: argparse.Namespace, seeds: int) -> argparse.Namespace:
    """Return the settings with another number of seeds."""
    return argparse.Namespace(**{**vars(given), "seeds": seeds})


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


# ── The command ──────────────────────────────────────────────────────────────────────────────────────────────────────
def main(experiment: Experiment, name: str, text: str | None) -> None:
    """Run the command: ``--seeds``, ``--steps``, ``--smoke``, and ``--json`` for a program that reads the result."""
    parser = argparse.ArgumentParser(
        f"python -m experiments.{name}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=experiment.seeds, help="from 2 to 10 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=experiment.steps, help="of each run (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="two seeds and two steps: seconds, and no figures")
    parser.add_argument("--fault", action="store_true", help="take a line of the method out first")
    parser.add_argument("--json", type=Path, help="write the tables to this file too")
    given = parser.parse_args()
    given.first = experiment.first
    if given.smoke:
        given.seeds = given.steps = 2
    if given.fault and experiment.fault is None:
        parser.error(f"experiments.{name} has no fault to put in; leave --fault out")
    begun = time.perf_counter()
    torch.set_num_threads(1)
    with suppress_third_party_output(), experiment.fault.put() if given.fault else nullcontext():
        found = experiment.find(given)
    seconds = time.perf_counter() - begun
    print(found.describe())
    print(f"{given.seeds} seeds, {given.steps} steps, {seconds:.0f} s")
    if given.json is not None:
        tables = [dataclasses.asdict(table) for table in found.tables]
        told = {"seconds": round(seconds), "seeds": given.seeds, "steps": given.steps}
        given.json.write_text(json.dumps({**told, "tables": tables}), encoding="utf-8")
