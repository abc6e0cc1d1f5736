"""Does LoRA-Pro's loss fall faster than LoRA's, each at its best rate?

    python -m experiments.lora_pro [--seeds 5] [--steps 60] [--smoke]

A linear student of 64 x 64 with r = 16 learns a change of rank 16 from its teacher (at a lower rank the loss that it
cannot fall below hides how fast it falls); a full fine-tuning of the same weight stands beside. Under SGD,
and under AdamW with the paper's algorithm. The efficient form of later code, which keeps moments of the factors' size,
stands beside too: the paper claims nothing of it.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

import lorac
from experiments._finding import Expected, Finding
from experiments._study import Experiment, Fault, Question, adamw, answer, log_mean, main
from experiments._teacher import side
from lorac.training import LoRAPro

LORA = lorac.LoRA(r=16, alpha=16, targets=["0"])
FULL = lorac.Full(targets=["0"])


def sgd(parameters: list[torch.Tensor], rate: float) -> Any:
    return torch.optim.SGD(parameters, lr=rate)


QUESTIONS = [
    Question(
        "SGD",
        {"LoRA": side(LORA, sgd), "LoRA-Pro": side(LORA, sgd, LoRAPro), "full fine-tuning": side(FULL, sgd)},
        (1.0, 3.0, 5.0, 10.0, 20.0, 30.0, 40.0),
        log_mean,
        "mean of log10(loss) over the steps",
    ),
    Question(
        "AdamW",
        {
            "LoRA": side(LORA, adamw),
            "LoRA-Pro, efficient": side(LORA, adamw, LoRAPro),
            "LoRA-Pro, full (on SGD)": side(LORA, sgd, lambda c, o: LoRAPro(c, o, full=True)),
            "full fine-tuning": side(FULL, adamw),
        },
        (0.003, 0.01, 0.03, 0.1, 0.3),
        log_mean,
        "mean of log10(loss) over the steps",
    ),
]

EXPECTED = [
    Expected("SGD", "LoRA-Pro", "LoRA", "section 4"),
    Expected("AdamW", "LoRA-Pro, full (on SGD)", "LoRA", "section 4"),
]
EXPERIMENT = Experiment(
    claim="With gradients adjusted to be nearest to full fine-tuning's, LoRA's loss falls faster.",
    source="Wang et al., LoRA-Pro, arXiv 2407.18242, section 4",
    find=lambda given: Finding(answer(QUESTIONS, given), EXPECTED),
    steps=60,
    fails_by="adjusted gradients with which the loss falls no faster",
    fault=Fault("gradients are left as they are", lambda: patch.object(LoRAPro, "before")),
)

if __name__ == "__main__":
    main(EXPERIMENT, "lora_pro", __doc__)
