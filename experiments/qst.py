"""Does a side network beside a 4-bit model keep less for its backward pass than a LoRA in it, and learn as much?

    python -m experiments.qst [--seeds 5] [--steps 120] [--smoke]

A Llama of four layers (width 64) over characters knows Python's manual; the weights of its blocks are rounded to NF4,
and it is to learn the standard library's code, by QST (r = 4, downsamplers of rank 14) or by LoRAs of rank 4 on all
linear layers of the blocks (QLoRA). "Kept" is what a step keeps for its backward pass, by torch's own hooks, weights
left out. Blended as in the paper, a = 1, a fresh side network leaves the model as it is; with a = 0, where its output
alone is read, it does not. "As much" is taken as a loss at most a twentieth above QLoRA's; after these few steps it is
just above that, and longer runs were not tried.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import transformers
from torch import Tensor, nn

import lorac
from benchmarks.side import kept
from experiments._finding import Expected, Finding, Table
from experiments._reader import ALPHABET, tasks
from experiments._study import Experiment, Fault, Losses, Question, adamw, answer, last, main, trained
from lorac.frontend.quantised_weights import NF4, QUANTISATION_LEVELS
from lorac.variants.base import ParamSpec
from lorac.variants.initialisers import zeros

WIDTH, LENGTH, ROWS, BLOCK = 64, 32, 8, 64
RATES = (0.003, 0.01, 0.03)
QLORA, QST, ALONE, NEAR = "QLoRA", "QST", "QST, a = 0", "a twentieth above QLoRA"
LOSS, START, KEPT, VALUES = "code", "start", "kept for the backward pass", "values trained"


def drawn(text: Tensor, rows: int, seed: int) -> dict[str, Tensor]:
    """Return pieces of a text as a causal model takes them."""
    places = torch.randint(len(text) - LENGTH, (rows, 1), generator=torch.Generator().manual_seed(seed))
    ids = text[places + torch.arange(LENGTH)]
    return {"input_ids": ids, "labels": ids}


@functools.cache
def host(steps: int) -> Any:
    """Return a Llama that has learnt the manual in so many steps, its blocks rounded."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(ALPHABET), use_cache=False, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        model(**drawn(tasks()[0].text, 4 * ROWS, step)).loss.backward()
        optimizer.step()
    round_weights(model.model.layers)
    return model.eval()


@torch.no_grad()
def round_weights(layers: nn.Module) -> None:
    """Round the weights of linear layers to NF4, in groups of 64 of a row."""
    levels = torch.tensor(QUANTISATION_LEVELS[NF4])
    for layer in (layer for layer in layers.modules() if isinstance(layer, nn.Linear)):
        groups = layer.weight.unflatten(1, (-1, BLOCK))
        largest = groups.abs().amax(-1, keepdim=True)
        nearest = ((groups / largest)[..., None] - levels).abs().argmin(-1)
        layer.weight.copy_((levels[nearest] * largest).flatten(1))


def begin(side: str, seed: int, steps: int) -> Any:
    """Return the model with a fresh adapter, to be trained."""
    model, name = host(2 * steps), f"seed{seed}"
    lora = lorac.LoRA(r=4, alpha=4, targets=r"model\.layers\..*_proj")
    method = lora if side == QLORA else lorac.QST.of(model, r=4, bottleneck=14)
    compiled: Any = lorac.compile(model, {name: method})
    if side == ALONE:
        compiled.adapters[name].tensors["model.norm"]["alpha"].data.zero_()
    return compiled.train()


def learn(side: str, rate: float, seed: int, steps: int) -> Losses:
    """Let a side learn the code; the last loss is that of pieces which are always the same."""
    compiled = begin(side, seed, steps)
    optimizer = adamw([p for p in compiled.parameters() if p.requires_grad], rate)

    def step(index: int) -> float:
        if index == steps:
            return held_loss(compiled)
        loss = compiled(**drawn(tasks()[1].text, ROWS, 10_000 * seed + index)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return trained(step, steps)


@torch.no_grad()
def held_loss(model: Callable[..., Any]) -> float:
    """Return the loss on pieces of the code that are always the same."""
    return float(model(**drawn(tasks()[1].text, 256, -1)).loss)


def find(given: argparse.Namespace) -> Finding:
    """Return what each side learns, where it begins, and what a step of it keeps."""
    sides = {name: functools.partial(learn, name) for name in (QLORA, QST)}
    (losses,) = answer([Question(LOSS, sides, RATES, last, "loss on code, in nats a character")], given)
    scores = {**losses.scores, NEAR: [1.05 * value for value in losses.scores[QLORA]]}
    base = held_loss(host(2 * given.steps))
    fresh = {name: [begin(name, seed, given.steps) for seed in range(given.seeds)] for name in (QLORA, QST, ALONE)}
    batch = drawn(tasks()[1].text, ROWS, 0)
    bytes_kept = {name: kept(one, batch) for name, (one, *_) in fresh.items()}
    ratios = {name: [found / bytes_kept[QLORA]] for name, found in bytes_kept.items()}
    counts = {name: [sum(p.numel() for p in one.parameters() if p.requires_grad)] for name, (one, *_) in fresh.items()}
    off = {name: [abs(held_loss(one) - base) for one in models] for name, models in fresh.items()}
    return Finding(
        [
            dataclasses.replace(losses, scores=scores, rates={**losses.rates, NEAR: losses.rates[QLORA]}),
            Table(START, "distance of the first loss from the model's own", off),
            Table(KEPT, "bytes, as a share of QLoRA's", ratios),
            Table(VALUES, "by all alike", counts),
        ],
        EXPECTED,
    )


SPECS = lorac.QST.params


def begin_alone(method: lorac.QST, site: Any) -> dict[str, ParamSpec]:
    """Return the tensors of a side network that is read alone at first: a starts at 0."""
    return SPECS(method, site) | {"alpha": ParamSpec((1,), zeros, decay=False)}


EXPECTED = [
    Expected(KEPT, QST, 0.6),
    Expected(START, QST, 1e-6),
    Expected(START, QST, ALONE, "section 3"),
    Expected(LOSS, QST, NEAR),
]
EXPERIMENT = Experiment(
    claim="A side network that reads a frozen 4-bit model starts at its loss, keeps far less for the backward pass "
    "than a LoRA of as many values, and learns as much.",
    source="Zhang et al., QST, arXiv 2401.07159, sections 3 and 4",
    find=find,
    steps=120,
    fails_by="a side network that keeps as much for the backward pass, starts off the model, or learns less",
    fault=Fault(
        "the blend does not start at the model's own output", lambda: patch.object(lorac.QST, "params", begin_alone)
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT, "qst", __doc__)
