"""Do a mixture's softmax weights collapse to one expert, and does ReMix's policy, with equal weights, do better?

    python -m experiments.remix [--seeds 4] [--steps 60] [--smoke]

A Llama over characters knows Python's manual. A recipe of `lorac train` lets it learn code, sums and the manual in
rot13 together, by eight LoRAs of rank 2 in every layer. ReMix has two of them act for a token, and its router learns
from M sampled selections a step; a softmax router (MeteoRA over all eight, trained with them) weighs all. A LoRA trains
as many values. The effective number of experts is (Σπ)²/Σπ² of a token's weights, the mean over tokens and layers. The
rates are chosen on one seed. This cannot show the collapse, which takes the paper's routers some 1 000 steps, and its
softmax router acts with two experts, not with all: lines on it are ours.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import lorac
from experiments._char_lm import held_loss, host, pieces, split, texts, tokenizer
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Losses, Question, answer, fewer, last, main
from lorac.trainer import Recipe, train

HOSTS, ROWS, EXPERTS, ACTING = 2, 6, 8, 2
RATES = (3e-3, 1e-2, 3e-2)
MIXED = {"r": 2, "experts": EXPERTS, "targets": "all-linear"}
LORA, SOFTMAX = "LoRA, r = 20", "softmax router"
DRAWS = {f"ReMix, M = {m}": m for m in (2, 4, 8)}
ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    LORA: {"method": "lora", "r": 20, "alpha": 20, "targets": "all-linear"},
    SOFTMAX: {"method": "meteora", "alpha": 2, "top_k": EXPERTS, "train_experts": True, **MIXED},
    **{name: {"method": "remix", "alpha": 4, "top_k": ACTING, **MIXED} for name in DRAWS},
}
LOSS, SUPPORT, VALUES = "loss", "effective number of experts", "values trained"
QUIET = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}


@functools.cache
def trained(name: str, rate: float, seed: int, steps: int) -> Any:
    """Train a side by a recipe; return the compiled model."""
    import datasets

    generator = torch.Generator().manual_seed(seed)
    characters = tokenizer()
    rows = [row for text in texts().values() for row in pieces(split(text)[0], 2 * steps, generator).tolist()]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows")
        datasets.Dataset.from_dict({"text": characters.batch_decode(rows)}).save_to_disk(data)
        recipe = Recipe(
            adapters={"mine": ADAPTERS[name]},
            data=str(data),
            loss=[{"name": "sampled_selection_loss", "draws": DRAWS[name]}] if name in DRAWS else [],
            arguments={
                **QUIET,
                "max_steps": steps,
                "per_device_train_batch_size": ROWS,
                "learning_rate": rate,
                "lr_scheduler_type": "constant",
                "seed": seed,
            },
        )
        with contextlib.redirect_stdout(sys.stderr):  # the trainer prints what it logs
            return train(host(seed % HOSTS, 8 * steps), characters, recipe, Path(folder, "run"))


def mean_loss(name: str, rate: float, seed: int, steps: int) -> Losses:
    """Return the mean held-out loss over the texts."""
    model = trained(name, rate, seed, steps)
    return [statistics.fmean(held_loss(model, text) for text in texts().values())]


@torch.no_grad()
def support(name: str, rate: float, seed: int, steps: int) -> float:
    """Return the effective number of experts on held-out text."""
    adapter = trained(name, rate, seed, steps).adapters["mine"]
    model: Any = lorac.compile(host(seed % HOSTS, 8 * steps), {"mine": adapter}, aux=["router"])
    found = []
    for text in texts().values():
        model(input_ids=pieces(split(text)[1], 16, torch.Generator().manual_seed(0)))
        for logits in model.aux["router"].values():
            weights = logits.softmax(-1)
            if name in DRAWS:
                weights = torch.zeros_like(weights).scatter(-1, weights.topk(ACTING).indices, 1.0)
            found.append(float((weights.sum(-1).square() / weights.square().sum(-1)).mean()))
    return statistics.fmean(found)


def find(given: argparse.Namespace) -> Finding:
    """Return each side's loss, and how many experts act in it."""
    sides = {name: functools.partial(mean_loss, name) for name in ADAPTERS}
    few = fewer(given, 1)
    (chosen,) = answer([Question(LOSS, sides, RATES, last, "the mean over the texts, held out")], few)
    places = {name: [(name, chosen.rates[name], seed, given.steps) for seed in range(given.seeds)] for name in ADAPTERS}
    losses = {name: [mean_loss(*one)[-1] for one in own] for name, own in places.items()}
    acting = {name: [support(*one) for one in own] for name, own in places.items() if name != LORA}
    counts = {
        name: [sum(t.numel() for t in trained(*own[0]).adapters["mine"].parameters())] for name, own in places.items()
    }
    return Finding(
        [
            Table(LOSS, chosen.what, losses, chosen.rates),
            Table(SUPPORT, f"of {EXPERTS}", acting),
            Table(VALUES, "by all nearly alike", counts),
        ],
        EXPECTED,
    )


BEST = f"ReMix, M = {max(DRAWS.values())}"
EXPECTED = [
    Expected(SUPPORT, SOFTMAX, float(ACTING)),
    Expected(LOSS, BEST, SOFTMAX),
    Expected(LOSS, BEST, LORA, "section 5"),
    Expected(LOSS, BEST, f"ReMix, M = {min(DRAWS.values())}", "section 5"),
]
EXPERIMENT = Experiment(
    claim="A mixture's softmax weights collapse to one expert; ReMix, whose experts act equally, learns more, and the "
    "more so the more selections it samples.",
    source="Qiu et al., ReMix, arXiv 2603.10160, sections 3 and 5",
    find=find,
    steps=60,
    seeds=4,
    fails_by="experts that act equally and learn less than a LoRA of as many values",
)

if __name__ == "__main__":
    main(EXPERIMENT, "remix", __doc__)
