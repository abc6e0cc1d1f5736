"""Do bottlenecks after a frozen vision transformer's blocks beat its head alone, and does a start at zero matter?

    python -m experiments.adaptertune [--seeds 5] [--steps 100] [--smoke]

A small vision transformer that reads printed digits is to tell ten letters apart. A new head is trained alone, or with
AdapterTune's bottlenecks, whose second matrix starts at zero, or drawn as the first. Each has its best rate. The start
is how far the logits are from the frozen model's, relative to them, before the first step.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

import lorac
from experiments._characters import DIGITS, pictures
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Fault, Losses, Question, adamw, answer, last, main, trained

LETTERS, RANK, ROWS, SIZE = "ABCDEFGHJK", 8, 64, 12
HEAD, ZERO, RANDOM = "head alone", "start at zero", "start at random"
RATES = (0.003, 0.01, 0.03)
LOSS, START, VALUES = "letters", "logits at the start", "values trained"


def fit(model: Any, optimizer: Any, characters: str, seed: int, steps: int) -> Losses:
    """Train on characters; the last loss is that of pictures held out."""
    labels = torch.arange(2000) % len(characters)
    x, held = (pictures(labels, 2 * seed + k, characters=characters, size=SIZE)[:, None] for k in range(2))
    generator = torch.Generator().manual_seed(seed)

    def step(index: int) -> float:
        if index == steps:
            with torch.no_grad():
                return float(F.cross_entropy(model(held), labels))
        rows = torch.randint(len(x), (ROWS,), generator=generator)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return trained(step, steps)


@functools.cache
def host(seed: int, steps: int) -> nn.Module:
    """Return a vision transformer that reads digits, with a new head."""
    from timm.models import VisionTransformer

    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=SIZE, patch_size=3, in_chans=1, num_classes=10, embed_dim=32, depth=3, num_heads=4, mlp_ratio=2
    )
    fit(model, torch.optim.AdamW(model.parameters(), lr=3e-3), DIGITS, seed, steps)
    model.reset_classifier(10)
    return model.eval()


def made(side: str, seed: int, steps: int) -> Any:
    """Return the compiled model of a side."""
    method: Any = lorac.AdapterTune(r=RANK, modules_to_save=["head"])
    if side == HEAD:
        method = lorac.Full(targets=["head"], bias="lora_only")
    model = host(seed, 2 * steps)
    compiled: Any = lorac.compile(model, {"a": method}, example_inputs=(torch.zeros(2, 1, SIZE, SIZE),))
    if side == RANDOM:
        torch.manual_seed(seed)
        for own in compiled.adapters["a"].tensors.values():
            nn.init.xavier_uniform_(own["up"])
    return compiled.train()


def learn(side: str, rate: float, seed: int, steps: int) -> Losses:
    """Learn the letters."""
    compiled = made(side, seed, steps)
    return fit(compiled, adamw([p for p in compiled.parameters() if p.requires_grad], rate), LETTERS, seed, steps)


@torch.no_grad()
def drift(side: str, seed: int, steps: int) -> float:
    """Return how far the logits are from the frozen model's at the start, relative to them."""
    x = pictures(torch.arange(100) % 10, seed, characters=LETTERS, size=SIZE)[:, None]
    compiled = made(side, seed, steps).eval()
    before, after = compiled(x, adapters=None), compiled(x)
    return float((after - before).norm() / before.norm())


def find(given: argparse.Namespace) -> Finding:
    """Return the losses, how far each side starts from the frozen model, and how many values it trains."""
    sides = {name: functools.partial(learn, name) for name in (HEAD, ZERO, RANDOM)}
    (losses,) = answer([Question(LOSS, sides, RATES, last, "loss on pictures held out")], given)
    starts = {name: [drift(name, seed, given.steps) for seed in range(given.seeds)] for name in sides}
    values = {
        name: [sum(p.numel() for p in made(name, 0, given.steps).parameters() if p.requires_grad)] for name in sides
    }
    return Finding(
        [
            losses,
            Table(START, "distance from the frozen model's, relative to them", starts),
            Table(VALUES, "with the head", values),
        ],
        EXPECTED,
    )


begin_at_zero = made


def begin_at_random(side: str, seed: int, steps: int) -> Any:
    """Return the compiled model of a side, whose bottlenecks start at random."""
    return begin_at_zero(RANDOM if side == ZERO else side, seed, steps)


EXPECTED = [
    Expected(LOSS, ZERO, HEAD, "the abstract"),
    Expected(LOSS, ZERO, RANDOM, "the abstract"),
    Expected(START, ZERO, 1e-6, "the abstract"),
    Expected(START, 0.1, RANDOM),
]
EXPERIMENT = Experiment(
    claim="Bottlenecks between the blocks of a frozen vision transformer are better than a new head alone, and those "
    "that start at zero begin exactly at the frozen model and learn better than those drawn at random.",
    source="Khazem, AdapterTune, arXiv 2603.14706, abstract",
    find=find,
    steps=100,
    fails_by="bottlenecks that add nothing to a new head, or a random start that learns as well",
    fault=Fault("the second matrix does not start at zero", lambda: patch.dict(globals(), made=begin_at_random)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "adaptertune", __doc__)
