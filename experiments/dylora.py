"""Is one DyLoRA at every rank as good as a LoRA trained at that rank, and better than a LoRA that is cut?

    python -m experiments.dylora [--seeds 5] [--steps 240] [--smoke]

A perceptron that reads characters learns code. One DyLoRA of rank 8 is trained and cut to each rank; so is one LoRA of
rank 8; and a LoRA is trained at each rank. All have as many steps. "As good" is taken as gaining at least nine tenths
of what the LoRA of that rank gains. A linear teacher is no task for this: DyLoRA's scale alpha/b changes with the rank,
so that no factors are best at two ranks.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any
from unittest.mock import patch

import torch

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._reader import TARGETS, held_loss, host, learn, side, tasks
from experiments._study import Experiment, Fault, Question, answer, last, main
from lorac.training import NestedRanks

R, RANKS, RATES = 8, (1, 2, 4, 8), (0.001, 0.003, 0.01, 0.03)
ONE, OWN, CUT, NEAR = "one DyLoRA, cut", "a LoRA of that rank", "one LoRA, cut", "nine tenths of its gain"
MANY = lorac.DyLoRA(r=R, alpha=R, targets=TARGETS)


def random_rank(compiled: Any, optimizer: Any) -> Any:
    """Train all components up to a rank that is drawn for each step."""
    return NestedRanks(compiled, optimizer, frozen=False)


def single(rank: int) -> Any:
    """Return a LoRA of a rank, scaled as a DyLoRA that is cut to it."""
    return lorac.LoRA(r=rank, alpha=R, targets=TARGETS)


def loss_at(compiled: Any, rank: int) -> float:
    """Return the loss on code at a rank; a LoRA that is cut keeps its scale."""
    own = compiled.eval().adapters["a"]
    if isinstance(own.variant, lorac.DyLoRA):
        return held_loss(functools.partial(compiled, adapters={"a": lorac.Active(1.0, rank=rank)}), tasks()[1])
    with torch.no_grad():
        for tensors in own.tensors.values():
            tensors["lora_B"][:, rank:] = 0
    return held_loss(compiled, tasks()[1])


def find(given: argparse.Namespace) -> Finding:
    """Return the loss of each side at each rank."""
    sides = {ONE: side(lambda: MANY, rule=random_rank)}
    sides |= {f"LoRA, r = {r}": side(functools.partial(single, r)) for r in RANKS}
    (losses,) = answer([Question("training", sides, RATES, last, "loss on code at the full rank")], given)
    tables: dict[int, dict[str, list[float]]] = {rank: {ONE: [], OWN: [], CUT: [], NEAR: []} for rank in RANKS}
    for seed in range(given.seeds):
        many, _ = learn(MANY, losses.rates[ONE], seed, given.steps, rule=random_rank)
        one, _ = learn(single(R), losses.rates[f"LoRA, r = {R}"], seed, given.steps)
        base = held_loss(host(seed % 10), tasks()[1])
        for rank in reversed(RANKS):
            own = losses.scores[f"LoRA, r = {rank}"][seed]
            tables[rank][ONE].append(loss_at(many, rank))
            tables[rank][CUT].append(loss_at(one, rank))
            tables[rank][OWN].append(own)
            tables[rank][NEAR].append(base - 0.9 * (base - own))
    return Finding([losses, *(Table(f"rank {r}", "loss on code", table) for r, table in tables.items())], EXPECTED)


EXPECTED = [
    *(Expected(f"rank {rank}", ONE, NEAR) for rank in RANKS),
    *(Expected(f"rank {rank}", ONE, CUT, "section 4") for rank in RANKS[:-1]),
]
EXPERIMENT = Experiment(
    claim="One training gives an adapter that is as good at every rank as one trained for that rank.",
    source="Valipour et al., DyLoRA, arXiv 2210.07558, sections 3 and 4",
    find=find,
    steps=240,
    fails_by="a first rank that is no better than the first of a whole LoRA's",
    fault=Fault(
        "every step has the whole rank", lambda: patch.object(NestedRanks, "_draw", lambda rule: max(rule.ranks))
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT, "dylora", __doc__)
