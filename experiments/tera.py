"""Does TeRA reach a higher rank with a vector's worth of values, and does that help?

    python -m experiments.tera [--seeds 5] [--steps 300] [--smoke]

A linear student of 64 x 64. TeRA trains 32 values, VeRA of rank 64 trains 128 and LoRA of rank 1 trains 128; the two
cannot train as few. The changes to learn are one that TeRA's own frozen factors make of other diagonals, and a dense
random one. The rank is the number of singular values above a thousandth of the largest, of the change that was learned
of the dense one. Of the dense change itself a quarter of the values learns less, so that no line is drawn there: rank
is of no use on a target without structure.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Fault, Question, answer, deciding, last, main
from experiments._teacher import SIZE, change_of, learn, side, weights

TERA = lorac.TeRA(order=2, targets=["0"])
SIDES = {
    "LoRA, r = 1": lorac.LoRA(r=1, alpha=1, targets=["0"]),
    "VeRA, r = 64": lorac.VeRA(r=64, targets=["0"]),
    "TeRA": TERA,
}
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
OWN, DENSE, RANK = "a change of TeRA's own family", "a dense change", "rank of the change learned"


def own_teacher(seed: int) -> tuple[Tensor, Tensor]:
    """Return W and W with a change that TeRA makes of random diagonals."""
    base, _ = weights(seed)
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False, dtype=torch.float64))
    compiled: Any = lorac.compile(model, {"a": TERA}, example_inputs=(torch.ones(2, SIZE).double(),))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for own in compiled.adapters["a"].tensors["0"].values():
            if own.requires_grad:
                own.copy_(torch.randn(own.shape, generator=generator, dtype=own.dtype))
    change = change_of(compiled)
    return base, base + 4 * change / torch.linalg.matrix_norm(change, 2)


def dense_teacher(seed: int) -> tuple[Tensor, Tensor]:
    """Return W and W with a random change."""
    base, _ = weights(seed)
    generator = torch.Generator().manual_seed(3000 + seed)
    return base, base + torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64) / SIZE**0.5


def find(given: argparse.Namespace) -> Finding:
    """Return the losses, and the ranks of what was learned."""
    own = {name: side(method, teacher=own_teacher) for name, method in SIDES.items()}
    dense = {name: side(method, teacher=dense_teacher) for name, method in SIDES.items()}
    what = "loss after the last step"
    tables = answer([Question(OWN, own, RATES, last, what), Question(DENSE, dense, RATES, last, what)], given)
    ranks = {
        name: [
            float(
                torch.linalg.matrix_rank(
                    change_of(learn(method, rate, seed, given.steps, teacher=dense_teacher)[0]), rtol=1e-3
                )
            )
            for seed in deciding(given)
        ]
        for (name, method), rate in zip(SIDES.items(), tables[1].rates.values(), strict=True)
    }
    return Finding([*tables, Table(RANK, "of 64, at the best rate", ranks)], EXPECTED)


def uncouple(tera: lorac.TeRA, W: Tensor, p: Any) -> Tensor:
    """Return a square weight with the change of a network whose core is 1 everywhere: a product of its factors."""
    factors = [tera._factor(p, k, *getattr(p, f"tera_U_{k}").shape).sum(1) for k in range(2 * tera.order)]
    up, down = (functools.reduce(torch.kron, part) for part in (factors[: tera.order], factors[tera.order :]))
    return W + len(W) ** -0.5 * torch.outer(up, down)


EXPECTED = [
    Expected(RANK, "LoRA, r = 1", "TeRA", "the abstract: a high rank with a vector's values"),
    Expected(OWN, "TeRA", "VeRA, r = 64"),
    Expected(OWN, "TeRA", "LoRA, r = 1"),
]
EXPERIMENT = Experiment(
    claim="A tensor network of frozen random factors reaches a high rank with as few values as vectors have, and "
    "learns better for it.",
    source="Gu et al., TeRA, arXiv 2509.03234, abstract",
    find=find,
    steps=300,
    first=100,
    fails_by="diagonals that leave the change at a low rank, or that reach nothing of their own family",
    fault=Fault("the network has no core that couples its modes", lambda: patch.object(lorac.TeRA, "weight", uncouple)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "tera", __doc__)
