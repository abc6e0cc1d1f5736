"""Does a merge of LoRAs rank by rank survive what no merge should notice, and how much of each task does it keep?

    python -m experiments.lego [--seeds 5] [--steps 200] [--smoke]

Three LoRAs of rank 8 learn three texts (modules of the standard library) on a perceptron that reads characters. Then
the ranks of each are shuffled, which changes none of them: "linear", which averages the factors, gives another merge,
LEGO the same. Beside it the loss over the three texts, for LEGO at several ranks with and without its output factor.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import statistics
import textwrap
import typing
from typing import Any
from unittest.mock import patch

import torch

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._reader import TARGETS, held_loss, host, learn, task
from experiments._study import Experiment, Fault, main

TEXTS = {module.__name__: task([inspect.getsource(module)]) for module in (json.decoder, textwrap, typing)}
R, RATE, KS = 8, 1e-2, (2, 8, 16)
MOVED, LOSS = "how far shuffled ranks move the merge", "loss over the three texts"


def learned(seed: int, steps: int) -> list[lorac.Adapter]:
    """Return a LoRA of each text."""
    method = lorac.LoRA(r=R, alpha=R, targets=TARGETS)
    found = (learn(method, RATE, seed, steps, text=text, name=name.replace(".", "_")) for name, text in TEXTS.items())
    return [next(iter(compiled.adapters.values())) for compiled, _ in found]


def shuffled(adapter: lorac.Adapter, generator: torch.Generator) -> lorac.Adapter:
    """Return the same LoRA with its ranks in another order."""
    tensors = {}
    for path, own in adapter.tensors.items():
        order = torch.randperm(R, generator=generator)
        tensors[path] = {"lora_A": own["lora_A"][order], "lora_B": own["lora_B"][:, order]}
    return lorac.Adapter(adapter.name, adapter.variant, tensors)


def mean_of_factors(adapters: list[lorac.Adapter]) -> lorac.Adapter:
    """Return the LoRA whose A and B are the means of the others', as tools do that call it linear."""
    tensors = {
        path: {key: sum(one.tensors[path][key].detach() for one in adapters) / len(adapters) for key in own}
        for path, own in adapters[0].tensors.items()
    }
    return lorac.Adapter("mean", adapters[0].variant, tensors)


def lego(adapters: list[lorac.Adapter], rank: int = R, **options: Any) -> lorac.Adapter:
    """Return LEGO's merge."""
    return lorac.merge(adapters, "lego", rank=rank, **options)


def change(adapter: lorac.Adapter) -> dict[str, torch.Tensor]:
    """Return the change of each weight (in, out)."""
    return {path: pair.a @ pair.b for path, pair in lorac.factors(adapter).items()}


def moved(one: lorac.Adapter, other: lorac.Adapter) -> float:
    """Return how far two merges are apart, relative to the first."""
    first, second = change(one), change(other)
    off = sum(float((second[path] - first[path]).square().sum()) for path in first)
    return (off / sum(float(own.square().sum()) for own in first.values())) ** 0.5


def loss(adapter: lorac.Adapter | None, seed: int) -> float:
    """Return the mean loss over the texts."""
    model: Any = host(seed % 10) if adapter is None else lorac.compile(host(seed % 10), {"merged": adapter})
    return statistics.fmean(held_loss(model, text) for text in TEXTS.values())


def find(given: argparse.Namespace) -> Finding:
    """Return how far shuffled ranks move each merge, and the losses of the merges."""
    ways = {
        "mean of factors": mean_of_factors,
        "LEGO": lego,
        **{f"LEGO, rank {k}": functools.partial(lego, rank=k) for k in KS},
        **{f"LEGO, rank {k}, as it is": functools.partial(lego, rank=k, reweight_output=False) for k in KS},
        "mean of changes": lambda loras: lorac.merge(loras, "linear", weights=[1 / len(loras)] * len(loras)),
        "TIES": lambda loras: lorac.merge(loras, "ties", weights=[1.0] * len(loras)),
    }
    far: dict[str, list[float]] = {}
    losses: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        loras, generator = learned(seed, given.steps), torch.Generator().manual_seed(seed)
        others = [shuffled(one, generator) for one in loras]
        losses.setdefault("base", []).append(loss(None, seed))
        for name, way in ways.items():
            merge = way(loras)
            losses.setdefault(name, []).append(loss(merge, seed))
            if name in {"mean of factors", "LEGO"}:
                far.setdefault(name, []).append(moved(merge, way(others)))
    return Finding([Table(MOVED, "distance over size", far), Table(LOSS, "in nats a character", losses)], EXPECTED)


def by_place(points: torch.Tensor, weights: torch.Tensor, k: int, *_: Any) -> torch.Tensor:
    """Return the clusters of points (n,): each takes every k-th point."""
    return torch.arange(len(points)) % k


EXPECTED = [
    Expected(MOVED, "LEGO", 1e-5),
    Expected(MOVED, 0.1, "mean of factors"),
    Expected(LOSS, "LEGO", "base"),
    Expected(LOSS, "LEGO", "mean of factors", "section 4"),
    Expected(LOSS, "LEGO, rank 16", "LEGO, rank 16, as it is", "section 3"),
]
EXPERIMENT = Experiment(
    claim="Clusters of ranks merge LoRAs so that the order of their ranks does not matter, and keep more of each task "
    "than a mean of factors; the output factor is needed at ranks above the parts'.",
    source="Zhao et al., LoRA-LEGO, arXiv 2409.16167, sections 3 and 4",
    find=find,
    steps=200,
    fails_by="merged ranks that depend on their order, or that keep no more than a mean of factors",
    fault=Fault(
        "ranks are clustered by their places",
        lambda: patch("lorac.merging.ways.lego.cluster", by_place),
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT, "lego", __doc__)
