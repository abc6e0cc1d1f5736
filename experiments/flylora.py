"""Do two FlyLoRAs disturb each other less than two LoRAs when both are on, and does the balance spread the choices?

    python -m experiments.flylora [--seeds 5] [--steps 200] [--smoke]

On a perceptron that reads characters, one adapter learns one module of the standard library and another one another.
Both are added. The loss of each text with both on, over that with its own alone, is what the other one costs. FlyLoRA
takes 8 of 32 ranks for each character; LoRA has as many ranks, or trains as many values. The changes of a weight that
are compared are B·A, of all ranks.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import statistics
import textwrap
import typing
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._reader import TARGETS, count_trained, held_loss, host, learn, side, task
from experiments._study import Experiment, Fault, Question, answer, last, main
from lorac.training.rules.balanced import Balanced

TEXTS = {"one": task([inspect.getsource(textwrap)]), "two": task([inspect.getsource(typing)])}
LORA, WIDE, FLY, UNBALANCED = "LoRA, r = 9", "LoRA, r = 32", "FlyLoRA", "FlyLoRA without balance"
METHODS: dict[str, Any] = {
    LORA: lorac.LoRA(r=9, alpha=9, targets=TARGETS),
    WIDE: lorac.LoRA(r=32, alpha=32, targets=TARGETS),
    FLY: lorac.FlyLoRA(r=32, alpha=64, top_k=8, targets=TARGETS),
    UNBALANCED: lorac.FlyLoRA(r=32, alpha=64, top_k=8, targets=TARGETS),
}
RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
ALONE, COST, COSINE = "loss alone", "cost of the other adapter", "cosine of the two changes"
LOAD, VALUES = "entropy of the choices", "values trained"


def balanced(compiled: Any, optimizer: Any) -> Balanced:
    """Balance the choices of ranks."""
    return Balanced(compiled, optimizer)


def options(name: str) -> dict[str, Any]:
    """Return what a side is trained with besides."""
    return {"rule": balanced} if name == FLY else {}


def figures(name: str, rate: float, seed: int, steps: int) -> dict[str, float]:
    """Train a side on both texts; return its figures."""
    method, more = METHODS[name], options(name)
    one, two = (
        learn(method, rate, seed, steps, text=text, name=own, **more)[0].adapters[own] for own, text in TEXTS.items()
    )
    both: Any = lorac.compile(host(seed % 10), {"one": one, "two": two}, aux=["chosen"] if name in FLYING else ())
    alone, together, loads = [], [], []
    for own, text in TEXTS.items():
        alone.append(held_loss(functools.partial(both, adapters=own), text))
        loads += [entropy(chosen) for chosen in both.aux.get("chosen", {}).values()]
        together.append(held_loss(functools.partial(both, adapters=dict.fromkeys(TEXTS, 1.0)), text))
    cosines = [abs(float(F.cosine_similarity(change(one, path), change(two, path), dim=0))) for path in one.tensors]
    found = {ALONE: alone, COST: [a - b for a, b in zip(together, alone, strict=True)], COSINE: cosines, LOAD: loads}
    return {title: statistics.fmean(values) for title, values in found.items() if values}


def change(adapter: lorac.Adapter, path: str) -> torch.Tensor:
    """Return B·A of a site, flat."""
    own = adapter.tensors[path]
    return (own["lora_B"].detach() @ own["lora_A"].detach()).flatten()


def entropy(chosen: torch.Tensor) -> float:
    """Return the entropy of how often each rank is chosen, relative to that of equal choices."""
    share = chosen.float().flatten(0, -2).sum(0)
    return float(torch.special.entr(share / share.sum()).sum() / torch.tensor(len(share)).log())


def find(given: argparse.Namespace) -> Finding:
    """Return the losses alone, what the other adapter costs, and how the changes and choices lie."""
    sides = {name: side(lambda method=method: method, **options(name)) for name, method in METHODS.items()}
    (losses,) = answer([Question("code", sides, RATES, last, "loss on the whole code")], given)
    found = {
        name: [figures(name, rate, seed, given.steps) for seed in range(given.seeds)]
        for name, rate in losses.rates.items()
    }
    tables = [
        Table(title, what, {name: [one[title] for one in own] for name, own in found.items() if title in own[0]})
        for title, what in WHAT.items()
    ]
    values = Table(VALUES, "by each adapter", {name: [count_trained(method)] for name, method in METHODS.items()})
    return Finding([losses, *tables, values], EXPECTED)


FLYING = (FLY, UNBALANCED)
WHAT = {
    ALONE: "in nats a character",
    COST: "in nats a character",
    COSINE: "absolute, the mean over the weights",
    LOAD: "relative to that of equal choices",
}
EXPECTED = [
    *(Expected(title, FLY, other, "the abstract") for title in (COST, COSINE) for other in (LORA, WIDE)),
    Expected(LOAD, UNBALANCED, FLY, "the ablation of balancing"),
]
EXPERIMENT = Experiment(
    claim="Adapters with frozen sparse random projections, of which each token takes a few ranks, disturb one another "
    "less than LoRAs when they are added, and a bias on the choice balances the ranks' load.",
    source="Zou et al., FlyLoRA, arXiv 2510.08396, abstract",
    find=find,
    steps=200,
    fails_by="frozen projections that disturb another task as LoRAs do, or a load that no bias evens out",
    fault=Fault("no bias moves", lambda: patch.object(Balanced, "after")),
)

if __name__ == "__main__":
    main(EXPERIMENT, "flylora", __doc__)
