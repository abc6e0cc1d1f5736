"""Do stacked factors add up clients' LoRAs exactly, where means of factors do not, and does the model learn better?

    python -m experiments.flora [--seeds 5] [--steps 20] [--smoke]

A perceptron that reads printed digits is to read them turned by an eighth. Six clients have pictures mostly of three
digits each. In each of three rounds every client trains a LoRA for some steps, and the server adds them up: by stacked
factors (FLoRA), or by the means of A and of B, of equal ranks (FedIT) or of ranks padded with zeros. Then the clients
go on from what the server sends: the sum and a fresh LoRA, or their ranks of the means.

At equal ranks the loss does not separate from FedIT's over five seeds, though the error of the sum does; clients with
two or four digits alone, ten clients, and digits turned by a quarter were tried on one or two seeds each.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from experiments._characters import pictures
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Losses, Question, adamw, answer, last, main
from experiments.lego import change, mean_of_factors
from lorac.merging import FederatedStack

CLIENTS, ROUNDS, TURN = 6, 3, 45.0
EQUAL, MIXED = (4,) * CLIENTS, (8, 8, 4, 2, 1, 1)
RATES = (0.01, 0.03, 0.1)
FLORA, FEDIT, FLORA_MIXED, PADDED = "FLoRA", "FedIT", "FLoRA, mixed ranks", "padded with zeros, mixed ranks"
SIDES = {FLORA: (True, EQUAL), FEDIT: (False, EQUAL), FLORA_MIXED: (True, MIXED), PADDED: (False, MIXED)}
OFF, LOSS, WRONG, VALUES = "the server's sum", "after the last round", "read wrong", "values trained"


def perceptron() -> nn.Module:
    """Return a perceptron as torch draws it."""
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))


@functools.cache
def host(seed: int) -> nn.Module:
    """Return a perceptron that reads upright digits."""
    torch.manual_seed(seed)
    model, labels = perceptron(), torch.arange(4000) % 10
    x, optimizer = pictures(labels, 1000 + seed).flatten(1), torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(300):
        rows = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), labels[rows]).backward()
        optimizer.step()
    return model


@functools.cache
def data(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return 120 pictures of each client and their labels, and last those that are held out."""
    own = [torch.tensor([(2 * k + j) % 10 for j in range(3)]) for k in range(CLIENTS)]
    labels = [torch.cat([most.repeat(20), torch.arange(10).repeat(6)]) for most in own]
    labels.append(torch.arange(1000) % 10)
    return [(pictures(y, 20 * seed + k, turn=TURN).flatten(1), y) for k, y in enumerate(labels)]


def lora(rank: int) -> lorac.LoRA:
    """Return a LoRA whose scale does not depend on its rank."""
    return lorac.LoRA(r=rank, alpha=2 * rank, targets=["0", "2"])


def resized(adapter: lorac.Adapter, rank: int) -> lorac.Adapter:
    """Return the first ranks of a LoRA, or it padded with zeros."""
    tensors = {}
    for path, own in adapter.tensors.items():
        more = rank - own["lora_A"].shape[0]
        a, b = F.pad(own["lora_A"].detach(), (0, 0, 0, more)), F.pad(own["lora_B"].detach(), (0, more))
        tensors[path] = {"lora_A": a.clone(), "lora_B": b.clone()}
    return lorac.Adapter(adapter.name, lora(rank), tensors)


def distance(found: lorac.Adapter, parts: list[lorac.Adapter]) -> float:
    """Return how far an adapter is from the mean of others' changes, relative to it."""
    each, off, whole = [change(part) for part in parts], 0.0, 0.0
    for path, own in change(found).items():
        wanted = torch.stack([one[path].double() for one in each]).mean(0)
        off += float((own - wanted).square().sum())
        whole += float(wanted.square().sum())
    return (off / whole) ** 0.5


@functools.cache
def federation(side: str, rate: float, seed: int, steps: int) -> tuple[Losses, float, float]:
    """Train in rounds; return the losses after each, the share read wrong at the end, and the mean error of the sum."""
    stacked, ranks = SIDES[side]
    model, (*clients, held) = host(seed), data(seed)
    methods = {f"client {k}": lora(rank) for k, rank in enumerate(ranks)}
    stack, mean, losses, offs, wrong = FederatedStack(), None, [], [], 0.0

    def train(name: str, compiled: Any) -> None:
        x, y = clients[[*methods].index(name)]
        optimizer = adamw([p for p in compiled.parameters() if p.requires_grad], rate)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(compiled(x), y).backward()
            optimizer.step()

    def continued(name: str, method: lorac.LoRA) -> lorac.Adapter:
        compiled: Any = lorac.compile(model, {"mean": method if mean is None else resized(mean, method.r)})
        train(name, compiled.train())
        return compiled.adapters["mean"]

    for _ in range(ROUNDS):
        if stacked:
            stack = stack.train_round(model, methods, train)
            parts = {name: one.adapter for name, one in stack.rounds[-1].items()}
            added, found = FederatedStack().add_round(parts).merged(), stack.merged()
        else:
            parts = {name: continued(name, method) for name, method in methods.items()}
            added = found = mean = mean_of_factors([resized(part, max(ranks)) for part in parts.values()])
        offs.append(distance(added, [*parts.values()]))
        loss, wrong = judge(lorac.merge_into(model, found), *held)
        losses.append(loss)
    return losses, wrong, statistics.fmean(offs)


@torch.no_grad()
def judge(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the loss on pictures, and the share that is read wrong."""
    logits = model(x)
    return float(F.cross_entropy(logits, y)), float((logits.argmax(-1) != y).double().mean())


def find(given: argparse.Namespace) -> Finding:
    """Return the errors of the sums, and how well the models read at the end."""
    sides = {name: functools.partial(lambda name, *run: federation(name, *run)[0], name) for name in SIDES}
    (losses,) = answer([Question(LOSS, sides, RATES, last, "loss on pictures of all digits")], given)
    runs = {
        name: [federation(name, rate, seed, given.steps) for seed in range(given.seeds)]
        for name, rate in losses.rates.items()
    }
    off = {name: [one for _, _, one in own] for name, own in runs.items()}
    wrong = {name: [one for _, one, _ in own] for name, own in runs.items()}
    size = sum(p.shape[0] + p.shape[1] for p in perceptron().parameters() if p.dim() > 1)
    return Finding(
        [
            Table(OFF, "distance from the mean of the clients' changes, relative to it", off),
            losses,
            Table(WRONG, "share of pictures of all digits", wrong),
            Table(
                VALUES, "in a round, by all clients", {name: [sum(ranks) * size] for name, (_, ranks) in SIDES.items()}
            ),
        ],
        EXPECTED,
    )


EXPECTED = [
    *(Expected(OFF, side, 1e-6, "the abstract") for side in (FLORA, FLORA_MIXED)),
    *(Expected(OFF, 0.01, side) for side in (FEDIT, PADDED)),
    Expected(LOSS, FLORA, FEDIT, "the abstract"),
    Expected(LOSS, FLORA_MIXED, PADDED, "the abstract"),
]
EXPERIMENT = Experiment(
    claim="Stacked factors add up clients' LoRAs of any ranks without an error, and the model learns better from them "
    "than from means of factors, of equal ranks or padded with zeros.",
    source="Wang et al., FLoRA, arXiv 2409.05976, abstract",
    find=find,
    steps=20,
    fails_by="a sum of stacked factors that is off, or models that learn as well from means of factors",
)

if __name__ == "__main__":
    main(EXPERIMENT, "flora", __doc__)
