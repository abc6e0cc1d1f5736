"""Is a LoRA that was trained wide and then squeezed as good as one that was trained at the small rank?

    python -m experiments.squeeze [--seeds 5] [--steps 400] [--smoke]

A linear student of 64 x 64 learns a change of rank 16 with a falling spectrum. A LoRA of rank 32 is squeezed to lower
ranks once at the end (Post), by stages while it trains (In), and once with a few steps more (Cont); against it stand
LoRAs that were trained at these ranks, each at its best rate. "As good" is taken as missing at most a tenth more of the
change.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Fault, Question, answer, last, main
from experiments._teacher import change_of, learn, missed, side, weights
from lorac.training import Squeeze, rank_stages, reduce_rank

WIDE, RANKS, RATES = 32, (1, 2, 4, 8), (0.003, 0.01, 0.03, 0.1)
POST, IN, CONT, DIRECT, NEAR = (
    "Post-Squeeze",
    "In-Squeeze",
    "Cont-Squeeze",
    "trained at that rank",
    "a tenth above that",
)


def lora(rank: int) -> Any:
    """Return a LoRA."""
    return lorac.LoRA(r=rank, alpha=rank, targets=["0"])


def misses(compiled: Any, seed: int, choice: str = "a") -> float:
    """Return the part of the change that a model lacks."""
    base, goal = weights(seed)
    return missed(change_of(compiled, choice), goal - base)


def squeezed(wide: Any, rate: float, seed: int, rank: int, steps: int) -> Mapping[str, float]:
    """Return what is missed at a rank by each way of squeezing."""
    small = reduce_rank(wide.adapters["a"], rank, name=f"r{rank}")
    wide.add_adapter(small)
    found = {POST: misses(wide, seed, small.name)}
    more, _ = learn(small, rate / 3, seed + 500, max(steps // 10, 1), teacher=lambda _: weights(seed), name=small.name)
    found[CONT] = misses(more, seed, small.name)
    stages = rank_stages(WIDE, rank, max(steps, WIDE.bit_length()))  # a smoke run has fewer steps than stages
    staged, _ = learn(lora(WIDE), rate, seed, steps, rule=lambda c, o: Squeeze(c, o, stages=stages))
    found[IN] = misses(staged, seed)
    return found


def find(given: argparse.Namespace) -> Finding:
    """Return what each side lacks at each rank."""
    sides = {f"LoRA, r = {r}": side(lora(r)) for r in (*RANKS, WIDE)}
    (losses,) = answer([Question("training", sides, RATES, last, "loss of the last step")], given)
    tables: dict[int, dict[str, list[float]]] = {rank: {} for rank in RANKS}
    for seed in range(given.seeds):
        rate = losses.rates[f"LoRA, r = {WIDE}"]
        wide, _ = learn(lora(WIDE), rate, seed, given.steps)
        for rank, table in tables.items():
            direct, _ = learn(lora(rank), losses.rates[f"LoRA, r = {rank}"], seed, given.steps)
            own = misses(direct, seed)
            for name, value in {DIRECT: own, NEAR: 1.1 * own, **squeezed(wide, rate, seed, rank, given.steps)}.items():
                table.setdefault(name, []).append(value)
    what = "part of the change that is missed"
    return Finding([losses, *(Table(f"rank {rank}", what, table) for rank, table in tables.items())], EXPECTED)


def cut(adapter: lorac.Adapter, rank: int, *, name: str) -> lorac.Adapter:
    """Return the first ranks of a LoRA."""
    own = {
        path: {"lora_A": one["lora_A"][:rank].detach(), "lora_B": one["lora_B"][:, :rank].detach()}
        for path, one in adapter.tensors.items()
    }
    return lorac.Adapter(name, lora(rank), own)


EXPECTED = [Expected(f"rank {rank}", way, NEAR) for rank in RANKS for way in (POST, CONT, IN)]
EXPERIMENT = Experiment(
    claim="A LoRA that was trained at a high rank and then squeezed is as good as one trained at the low rank.",
    source="Vulić et al., LoRA-Squeeze, arXiv 2602.10993",
    find=find,
    steps=400,
    fails_by="squeezed LoRAs that are worse than those trained at the low rank",
    fault=Fault("factors are cut, not decomposed", lambda: patch.dict(globals(), reduce_rank=cut)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "squeeze", __doc__)
