"""Does SoRA find how many ranks a task needs, and lose nothing by it?

    python -m experiments.sora [--seeds 5] [--steps 600] [--smoke]

A linear student of 64 x 64 learns a change of true rank 3 with a SoRA of rank 12, whose factors and gates one AdamW
trains; after each step the gates go through the proximal map. Next to it LoRAs of rank 3 and 12. Losses choose no rate
here, as all of them end near 0: SoRA's is the one that leaves the fewest ranks in use of those that miss less than a
hundredth of the change. The map's threshold is the rate that a gate moves by in a step; a smaller one (.002 at a rate
of .03) closes no gate.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any
from unittest.mock import patch

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Fault, Losses, Question, answer, deciding, last, main
from experiments._teacher import change_of, learn, missed, side, weights
from lorac.training import ProximalGates

TRUE, MOST, THRESHOLD, LEAST = 3, 12, 1e-2, 0.01
teacher = functools.partial(weights, rank=TRUE, ratio=0.9)
RATES = (0.003, 0.01, 0.03)
SORA = lorac.SoRA(r=MOST, alpha=MOST, targets=["0"])
NAME, LOSS, OPEN, MISSED = "SoRA, r = 12", "loss", "ranks in use", "part of the change that is missed"


def proximal(compiled: Any, optimizer: Any) -> Any:
    """Attach the proximal map."""
    return ProximalGates(compiled, optimizer, threshold=THRESHOLD)


def open_gates(compiled: Any) -> float:
    """Return how many gates are not 0."""
    return float(sum(int((own["gate"] != 0).sum()) for own in compiled.adapters["a"].tensors.values()))


@functools.cache
def pruned(rate: float, seed: int, steps: int) -> tuple[float, float]:
    """Return how many ranks a SoRA has in use after its training, and the part of the change that it misses."""
    compiled, _ = learn(SORA, rate, seed, steps, rule=proximal, teacher=teacher)
    base, goal = teacher(seed)
    return open_gates(compiled), missed(change_of(compiled), goal - base)


def ranks(rate: float, seed: int, steps: int) -> Losses:
    """Return how many ranks are in use, all of them where too much of the change is missed."""
    used, lacking = pruned(rate, seed, steps)
    return [used if lacking < LEAST else float(MOST)]


def find(given: argparse.Namespace) -> Finding:
    """Return how many ranks are in use at the end, what is missed, and the losses of LoRAs."""
    plain = {
        f"LoRA, r = {rank}": side(lorac.LoRA(r=rank, alpha=rank, targets=["0"]), teacher=teacher)
        for rank in (TRUE, MOST)
    }
    used, losses = answer(
        [
            Question(OPEN, {NAME: ranks}, RATES, last, f"of {MOST}"),
            Question(LOSS, plain, (0.003, 0.01, 0.03, 0.1), last, "after the last step"),
        ],
        given,
    )
    lacking = [pruned(used.rates[NAME], seed, given.steps)[1] for seed in deciding(given)]
    return Finding([used, Table(MISSED, "at the end", {NAME: lacking}), losses], EXPECTED)


EXPECTED = [
    Expected(OPEN, NAME, 8.4, "the abstract: 70 % of the values"),
    Expected(OPEN, NAME, 6.0),
    Expected(MISSED, NAME, LEAST),
]
EXPERIMENT = Experiment(
    claim="Gates under a proximal step close the ranks that a task does not need, at no cost in its loss.",
    source="Ding et al., SoRA, arXiv 2311.11696, sections 3 and 4",
    find=find,
    steps=600,
    first=100,
    fails_by="gates that stay open, as they do without the proximal map, or that close before the change is learned",
    fault=Fault("the proximal map leaves gates as they are", lambda: patch.object(ProximalGates, "after")),
)

if __name__ == "__main__":
    main(EXPERIMENT, "sora", __doc__)
