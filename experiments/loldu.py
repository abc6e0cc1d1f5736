"""Are the diagonals of a weight's own LDU factors a better place for few values than those of random factors?

    python -m experiments.loldu [--seeds 5] [--steps 200] [--smoke]

A perceptron that knows Python's manual learns the standard library's code by the diagonals of LoLDU at its three
layers. Beside them: the same diagonals between random factors of the same size; LoRA-XS of as many values; LoRA of rank
1, of 3.7 times as many; and fewer diagonals. Each has its best rate.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._reader import TARGETS, count_trained, side
from experiments._study import Experiment, Question, answer, last, main

WIDE, RATES = 96, (0.003, 0.01, 0.03, 0.1, 0.3)
LDU, RANDOM, XS, LORA = "LoLDU, r = 96", "random factors, r = 96", "LoRA-XS, r = 10", "LoRA, r = 1"
SMALL = ("LoLDU, r = 8", "LoLDU, r = 32")
METHODS: dict[str, Any] = {
    SMALL[0]: lorac.LoLDU(r=8, targets=TARGETS),
    SMALL[1]: lorac.LoLDU(r=32, targets=TARGETS),
    LDU: lorac.LoLDU(r=WIDE, targets=TARGETS),
    RANDOM: lorac.LoLDU(r=WIDE, targets=TARGETS),
    XS: lorac.LoRAXS(r=10, alpha=10, targets=TARGETS),
    LORA: lorac.LoRA(r=1, alpha=1, targets=TARGETS),
}
CODE, VALUES = "code", "values trained"


@torch.no_grad()
def draw_factors(compiled: Any, optimizer: Any) -> None:
    """Replace the factors of the weights by random ones of the same rows' and columns' lengths."""
    for own in compiled.adapters["a"].tensors.values():
        for name, dim in (("lora_A", 1), ("lora_B", 0)):
            drawn = torch.randn_like(own[name])
            own[name].copy_(drawn * own[name].norm(dim=dim, keepdim=True) / drawn.norm(dim=dim, keepdim=True))


def find(given: argparse.Namespace) -> Finding:
    """Return the losses, and how many values each side trains."""
    sides = {
        name: side(lambda method=method: method, **({"rule": draw_factors} if name == RANDOM else {}))
        for name, method in METHODS.items()
    }
    (losses,) = answer([Question(CODE, sides, RATES, last, "loss on the whole code")], given)
    values = {name: [count_trained(method)] for name, method in METHODS.items()}
    return Finding([losses, Table(VALUES, "by each side", values)], EXPECTED)


EXPECTED = [
    *(Expected(CODE, LDU, other) for other in (RANDOM, XS)),
    Expected(CODE, LDU, LORA, "its tables"),
    Expected(CODE, LDU, SMALL[1], "its tables"),
    Expected(CODE, SMALL[1], SMALL[0], "its tables"),
]
EXPERIMENT = Experiment(
    claim="Training the diagonal of a weight's LDU factors is better than random factors and than LoRA-XS of as many "
    "values, better than LoRA of more, and better still with more of the diagonal.",
    source="Shi et al., LoLDU, arXiv 2410.13618, section 4 and its tables",
    find=find,
    steps=200,
    fails_by="a diagonal that learns no more than random factors or a LoRA",
)

if __name__ == "__main__":
    main(EXPERIMENT, "loldu", __doc__)
