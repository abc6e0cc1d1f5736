"""Does RandLoRA go on where LoRA of as many values has spent its rank?

    python -m experiments.randlora [--seeds 5] [--steps 300] [--smoke]

A linear student of 64 x 64 learns a change of full rank with a flat spectrum, of which LoRA of rank 5 can take 5 of 64
parts at most; RandLoRA trains fewer values (576 for 640) and any rank. Beside it a change of rank 4, for which LoRA is
made. Both are trained by AdamW.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest.mock import patch

from torch import Tensor

import lorac
from experiments._finding import Expected, Finding
from experiments._study import Experiment, Fault, Question, answer, last, main
from experiments._teacher import side, weights

RATES = (0.003, 0.01, 0.03, 0.1, 0.3)
LORA = lorac.LoRA(r=5, alpha=5, targets=["0"])
RANDOM = lorac.RandLoRA(r=8, alpha=8, targets=["0"])


def question(title: str, rank: int) -> Question:
    """Return LoRA against RandLoRA on a change of a rank, its spectrum flat."""
    teacher = functools.partial(weights, rank=rank, ratio=1.0)
    sides = {
        "LoRA, r = 5": side(LORA, teacher=teacher),
        "RandLoRA": side(RANDOM, teacher=teacher),
    }
    return Question(title, sides, RATES, last, "loss after the last step")


QUESTIONS = [question("full rank", 64), question("rank 4", 4)]


def take_one(method: lorac.RandLoRA, W: Tensor, p: Any) -> Tensor:
    """Return a square weight with the change of the first basis alone."""
    scaled = p.randlora_lambda[:, :1, None] * p.randlora_A * p.randlora_gamma[:1]
    return W + method.alpha / method.r * p.randlora_B[:, :1].flatten(1) @ scaled.flatten(0, 1)


EXPECTED = [
    Expected("full rank", "RandLoRA", "LoRA, r = 5", "section 4"),
    Expected("rank 4", "LoRA, r = 5", "RandLoRA", "section 4"),
]
EXPERIMENT = Experiment(
    claim="Sums of scaled random bases learn changes of full rank with as few values as LoRA, whose rank limits it.",
    source="Albert et al., RandLoRA, arXiv 2502.00987, sections 3 and 4",
    find=lambda given: Finding(answer(QUESTIONS, given), EXPECTED),
    steps=300,
    fails_by="sums of bases that reach no further than LoRA's rank",
    fault=Fault("the sum has one basis, not all", lambda: patch.object(lorac.RandLoRA, "weight", take_one)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "randlora", __doc__)
