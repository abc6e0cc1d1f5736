"""Do two sparse adapters disturb each other less than two LoRAs, when both are on?

    python -m experiments.shira [--seeds 5] [--steps 200] [--smoke]

On a perceptron that reads characters, one adapter learns one module of the standard library and another one another.
Both are added. The loss of each text with both on, over that with its own alone, is what the other one costs. SHiRA
trains as many values as LoRA of rank 1, one or two of a hundred, at random places or at the largest weights. At ranks 2
and 4 it costs more than LoRA; at lower rates it costs less, and has learned less.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import statistics
import textwrap
import typing
from typing import Any

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._reader import TARGETS, count_trained, held_loss, host, learn, task
from experiments._study import Experiment, Question, answer, last, main

TEXTS = {"one": task([inspect.getsource(textwrap)]), "two": task([inspect.getsource(typing)])}
METHODS: dict[str, Any] = {
    "LoRA, r = 1": lorac.LoRA(r=1, alpha=1, targets=TARGETS),
    "SHiRA, random": lorac.SHiRA(r=1, targets=TARGETS),
    "SHiRA, magnitude": lorac.SHiRA(r=1, targets=TARGETS, mask="magnitude"),
}
RATES = (0.003, 0.01, 0.03, 0.1)
COST, ALONE, VALUES = "cost of the other adapter", "loss alone", "values trained"


def costs(method: Any, rate: float, seed: int, steps: int) -> tuple[float, float]:
    """Return the mean loss of the texts with their own adapter, and how much more it is with both."""
    adapters = [
        learn(method, rate, seed, steps, text=text, name=name)[0].adapters[name] for name, text in TEXTS.items()
    ]
    both: Any = lorac.compile(host(seed % 10), {one.name: one for one in adapters})
    alone, together = [], []
    for name, text in TEXTS.items():
        for losses, choice in ((alone, name), (together, dict.fromkeys(TEXTS, 1.0))):
            losses.append(held_loss(functools.partial(both, adapters=choice), text))
    return statistics.fmean(alone), statistics.fmean(together) - statistics.fmean(alone)


def find(given: argparse.Namespace) -> Finding:
    """Return the losses alone, and what the other adapter costs."""
    sides = {
        name: functools.partial(lambda method, rate, seed, steps: learn(method, rate, seed, steps)[1], method)
        for name, method in METHODS.items()
    }
    (losses,) = answer([Question("code", sides, RATES, last, "loss on the whole code")], given)
    found = {
        name: [costs(method, losses.rates[name], seed, given.steps) for seed in range(given.seeds)]
        for name, method in METHODS.items()
    }
    return Finding(
        [
            losses,
            Table(ALONE, "in nats a character", {name: [alone for alone, _ in own] for name, own in found.items()}),
            Table(COST, "in nats a character", {name: [more for _, more in own] for name, own in found.items()}),
            Table(VALUES, "by both alike", {name: [count_trained(method)] for name, method in METHODS.items()}),
        ],
        EXPECTED,
    )


EXPECTED = [Expected(COST, name, "LoRA, r = 1", "section 5") for name in METHODS if name != "LoRA, r = 1"]
EXPERIMENT = Experiment(
    claim="Adapters that change few weights each disturb one another less than LoRAs of as many values do.",
    source="SHiRA, arXiv 2406.13175, section 5",
    find=find,
    steps=200,
    fails_by="sparse changes that cost the other adapter as much as LoRAs do",
)

if __name__ == "__main__":
    main(EXPERIMENT, "shira", __doc__)
