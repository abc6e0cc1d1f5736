"""Does a LoRA that was trained on a pruned model help the whole one, and is alignment what makes it help?

    python -m experiments.loram [--seeds 4] [--steps 100] [--smoke]

A Llama over characters knows Python's manual. Half of its heads and hidden units are pruned by magnitude. What is left
is aligned on the manual for twice as many steps, or is not, or is aligned and then rounded to NF4 (QLoRAM). A LoRA
learns code on it, its factors go back to their places in the whole model, and the whole model is judged. A LoRA of the
same rank that is trained on the whole model trains more values; one of a lower rank about as many.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

import lorac
from experiments._char_lm import held_loss, host, learn, loss_of, pieces, split
from experiments._finding import Expected, Finding, Table
from experiments._reader import tasks
from experiments._study import Experiment, Losses, Question, answer, fewer, last, main
from lorac.frontend.quantised_weights import NF4, QUANTISATION_LEVELS
from lorac.training import loram

HOSTS, RANK, RATES = 2, 8, (3e-3, 1e-2, 3e-2)
BASE, LARGE, EQUAL = "whole model, no LoRA", "trained on the whole model", "on the whole, as many values"
ALIGNED, PRUNED, ROUNDED = "LoRAM", "LoRAM without alignment", "QLoRAM"
SMALL, LOSS, VALUES = "pruned model with its LoRA", "loss", "values trained"
BLOCK = 16
"""Weights that share a scale in NF4; the model's layers are too narrow for the usual 64."""


def lora(rank: int) -> lorac.LoRA:
    """Return a LoRA of every layer in the blocks."""
    return lorac.LoRA(r=rank, alpha=2 * rank, targets="all-linear")


@functools.cache
def smaller(seed: int, pretrained: int, aligned: int) -> loram.PrunedModel:
    """Return the pruned model, after so many steps of alignment."""
    found = loram.prune(host(seed, pretrained))
    if aligned:
        generator = torch.Generator().manual_seed(seed)
        text = split(tasks()[0].text)[0]
        batches = (pieces(text, 16, generator) for _ in itertools.count())
        loram.align(found, batches, steps=aligned, lr=2e-3, loss=loss_of)
    return found


@torch.no_grad()
def round_weights(found: loram.PrunedModel) -> loram.PrunedModel:
    """Return a pruned model whose layers have NF4's values."""
    levels = torch.tensor(QUANTISATION_LEVELS[NF4])
    rounded = loram.mask(found.model, 0.0)  # a copy
    for path in found.kept:
        weight: Any = rounded.model.get_submodule(path).weight
        blocks = weight.reshape(-1, BLOCK)
        scale = blocks.abs().amax(1, keepdim=True)
        nearest = (blocks / scale)[..., None].sub(levels).abs().argmin(-1)
        weight.copy_((levels[nearest] * scale).reshape(weight.shape))
    return loram.PrunedModel(rounded.model, found.kept, {}, found.sizes)


def small_of(name: str, seed: int, steps: int) -> loram.PrunedModel:
    """Return the smaller model of a side."""
    found = smaller(seed % HOSTS, 5 * steps, 0 if name == PRUNED else 2 * steps)
    return round_weights(found) if name == ROUNDED else found


def train(name: str, rate: float, seed: int, steps: int) -> tuple[float, float]:
    """Train a side; return the losses of the whole model with the LoRA, and of the model that it was trained on."""
    large, code = host(seed % HOSTS, 5 * steps), tasks()[1].text
    torch.manual_seed(seed)
    if name in {LARGE, EQUAL}:
        whole: Any = lorac.compile(large, {"a": lora(RANK if name == LARGE else RANK // 2)})
        reached = learn(whole, code, rate, seed, steps)[-1]
        return reached, reached
    small = small_of(name, seed, steps)
    compiled: Any = lorac.compile(small.model, {"a": lora(RANK)})
    own = learn(compiled, code, rate, seed, steps)[-1]
    back = loram.recover(compiled.adapters["a"], small.kept, large)
    return held_loss(lorac.compile(large, {"a": back}), code), own


def count(name: str) -> int:
    """Return how many values a side trains."""
    whole = name in {LARGE, EQUAL}
    model = host(0, 0) if whole else loram.prune(host(0, 0)).model
    compiled = lorac.compile(model, {"a": lora(RANK // 2 if name == EQUAL else RANK)})
    return sum(tensor.numel() for tensor in compiled.adapters["a"].parameters())


def find(given: argparse.Namespace) -> Finding:
    """Return the losses of the whole model on code with each side's LoRA, and those of the smaller models."""
    names = (LARGE, EQUAL, ALIGNED, PRUNED, ROUNDED)

    def side(name: str) -> Callable[[float, int, int], Losses]:
        return lambda rate, seed, steps: [train(name, rate, seed, steps)[0]]

    few = fewer(given, given.seeds // 2)
    (chosen,) = answer([Question(LOSS, {n: side(n) for n in names}, RATES, last, "")], few)
    seeds = range(given.seeds)
    found = {name: [train(name, chosen.rates[name], seed, given.steps) for seed in seeds] for name in names}
    losses: Mapping[str, list[float]] = {
        BASE: [held_loss(host(seed % HOSTS, 5 * given.steps), tasks()[1].text) for seed in seeds],
        **{name: [whole for whole, _ in own] for name, own in found.items()},
    }
    small = {name: [own for _, own in found[name]] for name in (ALIGNED, PRUNED, ROUNDED)}
    what = "of the whole model on code, held out, in nats a character" + chosen.what
    return Finding(
        [
            Table(LOSS, what, losses, {BASE: 0.0, **chosen.rates}),
            Table(SMALL, "the same loss, before its factors go back", small),
            Table(VALUES, "of the LoRA", {name: [count(name)] for name in names}),
        ],
        EXPECTED,
    )


EXPECTED = [
    Expected(LOSS, ALIGNED, BASE, "table 1"),
    Expected(LOSS, ROUNDED, BASE, "table 1"),
    Expected(LOSS, ALIGNED, PRUNED, "the ablation of alignment"),
    Expected(LOSS, LARGE, ALIGNED, "table 1"),
]
EXPERIMENT = Experiment(
    claim="A LoRA trained on a pruned, aligned model and scattered back helps the whole one, more than without "
    "alignment and less than one trained there.",
    source="Zhang et al., LoRAM, arXiv 2502.13533, table 1 and the ablation of alignment",
    find=find,
    steps=100,
    seeds=4,
    fails_by="a LoRA that is of no use to the whole model after it was trained on the pruned one",
)

if __name__ == "__main__":
    main(EXPERIMENT, "loram", __doc__)
