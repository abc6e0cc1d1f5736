"""Does LoRA-Pro's loss fall at least as fast as LoRA's, each at its best rate?

    python -m experiments.lora_pro [--seeds 5] [--steps 60] [--smoke]

A linear student of 64 x 64 with r = 4 learns a change of rank 16 from its teacher; a full fine-tuning of the same
weight stands beside. Under SGD, and under AdamW with LoRA-Pro's efficient and its full form.
"""

from __future__ import annotations

from typing import Any

import torch

import lorac
from experiments._study import Question, answer, log_mean, settings
from experiments._teacher import side
from lorac.training import LoRAPro

R = 4
FULL = lorac.Full(targets=["0"])


def sgd(parameters: list[torch.Tensor], rate: float) -> Any:
    return torch.optim.SGD(parameters, lr=rate)


def adamw(parameters: list[torch.Tensor], rate: float) -> Any:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


QUESTIONS = [
    Question(
        "SGD",
        {"LoRA": side(R, sgd), "LoRA-Pro": side(R, sgd, LoRAPro), "full fine-tuning": side(R, sgd, method=FULL)},
        (1.0, 3.0, 5.0, 10.0, 20.0, 30.0),
        "LoRA",
        log_mean,
        "mean of log10(loss) over the steps",
    ),
    Question(
        "AdamW",
        {
            "LoRA": side(R, adamw),
            "LoRA-Pro, efficient": side(R, adamw, LoRAPro),
            "LoRA-Pro, full (on SGD)": side(R, sgd, lambda c, o: LoRAPro(c, o, full=True)),
            "full fine-tuning": side(R, adamw, method=FULL),
        },
        (0.003, 0.01, 0.03, 0.1, 0.3),
        "LoRA",
        log_mean,
        "mean of log10(loss) over the steps",
    ),
]

if __name__ == "__main__":
    answer(QUESTIONS, settings(__doc__, "lora_pro", 60))
