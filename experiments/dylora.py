"""Is one DyLoRA at every rank as good as a LoRA trained at that rank, and better than a LoRA that is cut?

    python -m experiments.dylora [--seeds 5] [--steps 400] [--smoke]

A linear student of 64 x 64 learns a change of rank 16 with a falling spectrum. One DyLoRA of rank 8 is trained and cut
to each rank; so is one LoRA of rank 8; and a LoRA is trained at each rank. All have as many steps. "As good" is taken
as missing at most a tenth more of the change.
"""

from __future__ import annotations

import argparse
from typing import Any

import lorac
from experiments._study import Expected, Experiment, Finding, Question, Table, answer, last, main
from experiments._teacher import change_of, learn, missed, side, weights
from lorac.training import NestedRanks

R, RANKS, RATES = 8, (1, 2, 4, 8), (0.003, 0.01, 0.03, 0.1)
ONE, OWN, CUT = "one DyLoRA, cut", "a LoRA of that rank", "one LoRA, cut"
RANDOM_RANK = {"rule": lambda compiled, optimizer: NestedRanks(compiled, optimizer, frozen=False)}
MANY = lorac.DyLoRA(r=R, alpha=R, targets=["0"])


def single(rank: int) -> Any:
    """Return a LoRA of a rank, scaled as a DyLoRA that is cut to it."""
    return lorac.LoRA(r=rank, alpha=R, targets=["0"])


def misses(compiled: Any, seed: int, rank: int) -> float:
    """Return the part of the change that a model lacks at a rank; a LoRA that is cut keeps its scale."""
    base, goal = weights(seed)
    own = compiled.adapters["a"]
    if isinstance(own.variant, lorac.DyLoRA):
        return missed(change_of(compiled, {"a": lorac.Active(1.0, rank=rank)}), goal - base)
    a, b = own.tensors["0"]["lora_A"].detach(), own.tensors["0"]["lora_B"].detach()
    return missed(R / a.shape[0] * b[:, :rank] @ a[:rank], goal - base)


def find(given: argparse.Namespace) -> Finding:
    """Return what each side lacks at each rank."""
    sides = {ONE: side(MANY, **RANDOM_RANK), **{f"LoRA, r = {r}": side(single(r)) for r in RANKS}}  # type: ignore[arg-type]
    (losses,) = answer([Question("training", sides, RATES, last, "loss of the last step, at its rank")], given)
    tables = {rank: {ONE: [], OWN: [], CUT: []} for rank in RANKS}  # type: dict[int, dict[str, list[float]]]
    for seed in range(given.seeds):
        many, _ = learn(MANY, losses.rates[ONE], seed, given.steps, **RANDOM_RANK)  # type: ignore[arg-type]
        loras = {r: learn(single(r), losses.rates[f"LoRA, r = {r}"], seed, given.steps)[0] for r in RANKS}
        for rank, table in tables.items():
            table[ONE].append(misses(many, seed, rank))
            table[OWN].append(misses(loras[rank], seed, rank))
            table[CUT].append(misses(loras[R], seed, rank))
    for table in tables.values():
        table[NEAR] = [1.1 * own for own in table[OWN]]
    what = "part of the change that is missed"
    return Finding([losses, *(Table(f"rank {rank}", what, table) for rank, table in tables.items())], EXPECTED)


NEAR = "a tenth above that"
EXPECTED = [
    *(Expected(f"rank {rank}", ONE, NEAR) for rank in RANKS),
    *(Expected(f"rank {rank}", ONE, CUT) for rank in RANKS[:-1]),
]
EXPERIMENT = Experiment(
    claim="One training gives an adapter that is as good at every rank as one trained for that rank.",
    source="Valipour et al., DyLoRA, arXiv 2210.07558, sections 3 and 4",
    find=find,
    steps=400,
)

if __name__ == "__main__":
    main(EXPERIMENT, "dylora", __doc__)
