"""Does Adam over projected gradients learn from scratch as Adam does, with less state, where low-rank weights do not?

    python -m experiments.galore [--seeds 5] [--steps 400] [--smoke]

A perceptron of five layers learns to tell the next character of Python's manual, from nothing. Its first and last layer
are trained by Adam as a language model's embedding and head are. The three weights between (96 x 96) are trained by
Adam, by GaLore with a quarter of their rank, by LoRAs of that rank beside weights frozen as drawn, or as products B·A
of that rank. "As Adam does" is taken as a perplexity of at most a twentieth more. (A projection that is never renewed
was the first fault that was put in, and the claim was shown with it: here one subspace of a quarter is enough.)
"""

from __future__ import annotations

import argparse
import functools
import math
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._reader import ALPHABET, CONTEXT, HIDDEN, held_loss, tasks
from experiments._study import Experiment, Fault, Losses, Question, adamw, answer, last, main, trained
from lorac.training import GaLoreAdamW, galore_groups

R, GAP, BETWEEN, ENDS = HIDDEN // 4, 50, ["2", "4", "6"], ["0", "8"]
ADAM, GALORE, LORA, PRODUCT, NEAR = "Adam", "GaLore", "LoRA", "W = B·A", "a twentieth above Adam"
RATES = (0.003, 0.006, 0.01)
LOSS, AS_ADAM, STATE, VALUES = "from scratch", "as Adam does", "optimizer's state", "values trained"


def perceptron(*, product: bool = False) -> nn.Sequential:
    """Return the perceptron as torch draws it, or with a product of two matrices for each weight between."""
    wide, layers = len(ALPHABET), [nn.Linear(HIDDEN, HIDDEN) for _ in BETWEEN]
    narrow = [nn.Sequential(nn.Linear(HIDDEN, R, bias=False), nn.Linear(R, HIDDEN)) for _ in BETWEEN]
    between = [part for layer in (narrow if product else layers) for part in (layer, nn.ReLU())]
    return nn.Sequential(nn.Linear(CONTEXT * wide, HIDDEN), nn.ReLU(), *between, nn.Linear(HIDDEN, wide))


def made(side: str, rate: float, seed: int) -> tuple[Any, Any]:
    """Return a model and its optimizer."""
    torch.manual_seed(seed)
    if side in {ADAM, PRODUCT}:
        model: Any = perceptron(product=side == PRODUCT)
    elif side == LORA:
        model = lorac.compile(perceptron(), {"a": lorac.LoRA(r=R, alpha=R, targets=BETWEEN, modules_to_save=ENDS)})
    else:
        model = lorac.compile(perceptron(), {"a": lorac.Full(targets=BETWEEN, bias="all", modules_to_save=ENDS)})
    if side == GALORE:
        return model.train(), GaLoreAdamW(galore_groups(model, rank=R, update_proj_gap=GAP, scale=1.0), lr=rate)
    return model.train(), adamw([p for p in model.parameters() if p.requires_grad], rate)


def learn(side: str, rate: float, seed: int, steps: int) -> tuple[Any, Any, Losses]:
    """Learn the manual; return the model, its optimizer and the losses, of which the last is of places held out."""
    model, optimizer = made(side, rate, seed)
    batches = tasks()[0].batches(steps, seed)

    def step(index: int) -> float:
        if index == steps:
            return held_loss(model, tasks()[0])
        x, labels = batches[index]
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return model, optimizer, trained(step, steps)


def between(model: Any) -> list[Tensor]:
    """Return the matrices that are trained for the weights between."""
    if isinstance(model, nn.Sequential):
        return [p for layer in model[2:-1] for p in layer.parameters() if p.dim() > 1]
    return [tensor for own in model.adapters["a"].tensors.values() for tensor in own.values()]


def count_bytes(state: Any) -> int:
    """Return the bytes of all tensors in a state but counters."""
    if isinstance(state, Tensor):
        return state.nbytes if state.dim() else 0
    return sum(map(count_bytes, state.values())) if isinstance(state, dict) else 0


def find(given: argparse.Namespace) -> Finding:
    """Return the losses, and what the weights between cost."""
    sides = {name: functools.partial(lambda name, *run: learn(name, *run)[2], name) for name in SIDES}
    (losses,) = answer([Question(LOSS, sides, RATES, last, "loss on places held out")], given)
    near = {GALORE: losses.scores[GALORE], NEAR: [loss + math.log(1.05) for loss in losses.scores[ADAM]]}
    state, values = {}, {}
    for name in SIDES:
        model, optimizer, _ = learn(name, RATES[0], 0, 1)
        own = between(model)
        state[name] = [count_bytes({i: optimizer.state[tensor] for i, tensor in enumerate(own)})]
        values[name] = [sum(tensor.numel() for tensor in own)]
    return Finding(
        [
            losses,
            Table(AS_ADAM, "loss on places held out", near),
            Table(STATE, "bytes, of the weights between", state),
            Table(VALUES, "of the weights between", values),
        ],
        EXPECTED,
    )


def leave_whole(model: Any, **_: Any) -> list[dict[str, Any]]:
    """Return one group of parameters, whose gradients are not projected."""
    return [{"params": [p for p in model.parameters() if p.requires_grad]}]


SIDES = (ADAM, GALORE, LORA, PRODUCT)
EXPECTED = [
    Expected(AS_ADAM, GALORE, NEAR),
    Expected(LOSS, GALORE, LORA, "table 2"),
    Expected(LOSS, GALORE, PRODUCT, "table 2"),
    Expected(STATE, GALORE, ADAM, "table 2"),
]
EXPERIMENT = Experiment(
    claim="With gradients projected to a low rank, all weights learn from scratch as with Adam and with less state, "
    "where LoRA and products of that rank stay behind.",
    source="Zhao et al., GaLore, arXiv 2403.03507, section 5 and table 2",
    find=find,
    steps=400,
    fails_by="projected gradients that learn no better than a LoRA, or state as large as Adam's",
    fault=Fault("gradients are not projected", lambda: patch.dict(globals(), galore_groups=leave_whole)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "galore", __doc__)
