"""Do MiSS and BAT learn faster than LoRA of as many values?

    python -m experiments.miss [--seeds 5] [--steps 150] [--smoke]

A perceptron that knows Python's manual learns the standard library's code. Adapters sit on its three layers; MiSS and
BAT of rank 16 train 4 608 values, LoRA of rank 4 trains 4 224 and LoRA of rank 5 trains 5 280. Each has its best rate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import lorac
from experiments._finding import Expected, Finding
from experiments._reader import TARGETS, side
from experiments._study import Experiment, Losses, Question, answer, last, log_mean, main

METHODS = {
    "LoRA, r = 4": lambda: lorac.LoRA(r=4, alpha=4, targets=TARGETS),
    "LoRA, r = 5": lambda: lorac.LoRA(r=5, alpha=5, targets=TARGETS),
    "MiSS, r = 16": lambda: lorac.MiSS(r=16, targets=TARGETS),
    "BAT, r = 16": lambda: lorac.BAT(r=16, targets=TARGETS),
}
RATES = (0.001, 0.003, 0.01, 0.03)


@functools.cache
def sides() -> dict[str, Callable[[float, int, int], Losses]]:
    """Return a side for each method."""
    return {name: side(method) for name, method in METHODS.items()}


QUESTIONS = [
    Question("early", sides(), RATES, log_mean, "mean of log10(loss) over the steps"),
    Question("at the end", sides(), RATES, last, "loss on text that was not trained on"),
]
EXPECTED = [
    Expected(table, name, "LoRA, r = 5", "section 4")
    for table in ("early", "at the end")
    for name in ("MiSS, r = 16", "BAT, r = 16")
]
EXPERIMENT = Experiment(
    claim="Shards that share one trained block learn faster and end lower than LoRA of as many values.",
    source="Kang, MiSS and Bone, arXiv 2409.15371, section 4",
    find=lambda given: Finding(answer(QUESTIONS, given), EXPECTED),
    steps=150,
    fails_by="shards that learn more slowly than a LoRA of as many values, which is the case here",
)

if __name__ == "__main__":
    main(EXPERIMENT, "miss", __doc__)
