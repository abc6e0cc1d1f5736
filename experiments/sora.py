"""Does SoRA find how many ranks a task needs, and lose nothing by it?

    python -m experiments.sora [--seeds 5] [--steps 600] [--smoke]

A linear student of 64 x 64 learns a change of true rank 3 with a SoRA of rank 12, its gates trained by an optimizer of
their own with the proximal map. Beside it LoRAs of rank 3 and 12. Each is trained at its best rate.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import lorac
from experiments._study import Expected, Experiment, Finding, Question, Table, answer, last, main
from experiments._teacher import change_of, learn, missed, side, weights
from lorac.training import ProximalGates

TRUE, MOST, THRESHOLD = 3, 12, 2e-3
teacher = functools.partial(weights, rank=TRUE, ratio=0.9)
RATES = (0.003, 0.01, 0.03, 0.1)
SORA = lorac.SoRA(r=MOST, alpha=MOST, targets=["0"])
LOSS, OPEN, MISSED = "loss", "ranks in use", "part of the change that is missed"


def proximal(compiled: Any, optimizer: Any) -> Any:
    """Attach the proximal map."""
    return ProximalGates(compiled, optimizer, threshold=THRESHOLD)


def open_gates(compiled: Any) -> float:
    """Return how many gates are not 0."""
    return float(sum(int((own["gate"] != 0).sum()) for own in compiled.adapters["a"].tensors.values()))


def find(given: argparse.Namespace) -> Finding:
    """Return the losses, and how many ranks are in use at the end."""
    sides = {
        "SoRA, r = 12": side(SORA, rule=proximal, teacher=teacher),
        "LoRA, r = 3": side(lorac.LoRA(r=TRUE, alpha=TRUE, targets=["0"]), teacher=teacher),
        "LoRA, r = 12": side(lorac.LoRA(r=MOST, alpha=MOST, targets=["0"]), teacher=teacher),
    }
    (losses,) = answer([Question(LOSS, sides, RATES, last, "after the last step")], given)
    used, lacking = [], []
    for seed in range(given.seeds):
        compiled, _ = learn(SORA, losses.rates["SoRA, r = 12"], seed, given.steps, rule=proximal, teacher=teacher)
        base, goal = teacher(seed)
        used.append(open_gates(compiled))
        lacking.append(missed(change_of(compiled), goal - base))
    return Finding(
        [
            losses,
            Table(OPEN, f"of {MOST}", {"SoRA, r = 12": used}),
            Table(MISSED, "at the end", {"SoRA, r = 12": lacking}),
        ],
        EXPECTED,
    )


EXPECTED = [Expected(OPEN, "SoRA, r = 12", 6), Expected(MISSED, "SoRA, r = 12", 0.01)]
EXPERIMENT = Experiment(
    claim="Gates under a proximal step close the ranks that a task does not need, at no cost in its loss.",
    source="Ding et al., SoRA, arXiv 2311.11696, sections 3 and 4",
    find=find,
    steps=600,
)

if __name__ == "__main__":
    main(EXPERIMENT, "sora", __doc__)
