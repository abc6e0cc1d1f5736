"""Do experts that were trained apart serve together, and do low ranks of them serve as well as whole ones?

    python -m experiments.flexmore [--seeds 5] [--steps 80] [--smoke]

A Llama over characters knows Python's manual and is the public model. For code, for sums and for the manual in rot13
its MLPs get a second, whole expert each, trained on that text alone, with a row of the router that tells the text from
the manual. Then nothing is trained: the experts are joined by their rows, whole or as truncated differences from the
public model. As in the paper, each expert may have the rank that serves its own text best, which is found on two other
seeds. "As well" is taken as giving back at most a tenth of what whole experts gain. The rate is chosen on code. (Rows
that see their own text alone were tried first: joined, they send nearly all characters to one expert.)

The lines say little of how the experts are joined: they were shown with rows of zeros, and with low ranks of the
experts' matrices in place of their differences from the public model's. The line that would tell is that of ours.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

import lorac
from experiments._char_lm import SIZES, held_loss, host, learn, pieces, split, texts
from experiments._finding import Expected, Finding, Table
from experiments._reader import tasks
from experiments._study import (
    CHOOSERS,
    CHOOSING,
    Experiment,
    Fault,
    Losses,
    Question,
    answer,
    deciding,
    fewer,
    last,
    main,
)

RANKS, RATES, HOSTS = (4, 16, 32), (3e-3, 1e-2, 3e-2), 2
PUBLIC, ALONE, WHOLE, NEAR = "public model", "its own expert alone", "joined, whole", "a tenth of the gain above whole"
OWN = "joined, each at its best rank"
LOSS, VALUES, RATE = "loss", "values beside the public model", "rate"


def train(name: str, rate: float, seed: int, steps: int) -> tuple[lorac.Adapter, Losses]:
    """Train an expert of a text next to the public model's own MLP; return the mixture of the two, and the losses."""
    model, manual = host(seed % HOSTS, 6 * steps), split(tasks()[0].text)[0]
    rows = {path: torch.zeros(2, SIZES["hidden_size"]) for path, _ in model.named_modules() if path.endswith(".mlp")}
    start = lorac.FlexMoRE.from_experts(model, [model], rows, ranks=[0], name=name)
    compiled: Any = lorac.compile(model, {name: start}, aux=["router"])
    generator = torch.Generator().manual_seed(seed)

    def loss(mixture: Any, ids: Tensor) -> Tensor:
        both = torch.cat([ids, pieces(manual, len(ids), generator)])
        logits = mixture(input_ids=both).logits[: len(ids), :-1]
        gates = torch.stack([*mixture.aux["router"].values()])
        whose = (torch.arange(len(both)) < len(ids)).long()[None, :, None].expand(gates.shape[:-1])
        routed = F.cross_entropy(gates.flatten(0, -2), whose.flatten())
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()) + routed

    return compiled.adapters[name], learn(compiled, texts()[name], rate, seed, steps, loss)


def mean_loss(models: Sequence[Any]) -> float:
    """Return the mean held-out loss over the texts, of a model for each."""
    return statistics.fmean(held_loss(model, text) for model, text in zip(models, texts().values(), strict=True))


def count(adapters: Sequence[lorac.Adapter]) -> int:
    """Return how many values some adapters have together."""
    return sum(tensor.numel() for adapter in adapters for tensor in adapter.parameters())


@functools.cache
def best_ranks(rate: float, seeds: Sequence[int], steps: int) -> tuple[int, ...]:
    """Return the rank of each expert with which, all experts having it, its own text's loss is lowest."""
    losses: dict[int, list[list[float]]] = {rank: [] for rank in RANKS}
    for seed in seeds:
        model = host(seed % HOSTS, 6 * steps)
        experts = [train(name, rate, seed, steps)[0] for name in texts()]
        for rank in RANKS:
            joined = lorac.FlexMoRE.join(experts, model=model, ranks=[rank] * len(experts), normalise=True)
            compiled: Any = lorac.compile(model, {"a": joined})
            losses[rank].append([held_loss(compiled, text) for text in texts().values()])
    means = {rank: [statistics.fmean(own) for own in zip(*found, strict=True)] for rank, found in losses.items()}
    return tuple(min(RANKS, key=lambda rank: means[rank][place]) for place in range(len(texts())))


def compare(rate: float, seed: int, steps: int) -> tuple[dict[str, float], dict[str, int]]:
    """Return the loss of each side, and how many values it has."""
    model = host(seed % HOSTS, 6 * steps)
    experts = [train(name, rate, seed, steps)[0] for name in texts()]
    sides = {ALONE: experts}
    wanted = {WHOLE: (0,) * len(experts), **{f"joined, r = {rank}": (rank,) * len(experts) for rank in reversed(RANKS)}}
    wanted[OWN] = best_ranks(rate, range(CHOOSING, CHOOSING + CHOOSERS), steps)
    for side, ranks in wanted.items():
        sides[side] = [lorac.FlexMoRE.join(experts, model=model, ranks=ranks, normalise=True)]
    losses = {PUBLIC: mean_loss([model] * len(experts))}
    for side, adapters in sides.items():
        models = [lorac.compile(model, {"a": adapter}) for adapter in adapters]
        losses[side] = mean_loss(models * (len(experts) // len(models)))
    losses[NEAR] = 0.9 * losses[WHOLE] + 0.1 * losses[PUBLIC]
    counts = {
        side: sum(t.numel() for one in {id(a): a for a in own}.values() for t in one.parameters())
        for side, own in sides.items()
    }
    return losses, counts


def find(given: argparse.Namespace) -> Finding:
    """Return the losses of the public model, of each expert alone and of all of them joined."""

    def code(rate: float, seed: int, steps: int) -> Losses:
        return train("code", rate, seed, steps)[1]

    few = fewer(given, 2)
    (chosen,) = answer([Question(RATE, {"the expert of code": code}, RATES, last, "its held-out loss")], few)
    found = [compare(*chosen.rates.values(), seed, given.steps) for seed in deciding(given)]
    losses = {side: [one[side] for one, _ in found] for side in found[0][0]}
    counts = {side: [float(count)] for side, count in found[0][1].items()}
    what = "the mean over code, sums and rot13, held out, in nats a character"
    return Finding([chosen, Table(LOSS, what, losses), Table(VALUES, "of all three experts", counts)], EXPECTED)


JOIN = lorac.FlexMoRE.join


def join_without_rows(*args: Any, **options: Any) -> lorac.Adapter:
    """Return the joined experts, whose router has only zeros."""
    joined = JOIN(*args, **options)
    for tensors in joined.tensors.values():
        tensors["router"].zero_()
    return joined


EXPECTED = [
    Expected(LOSS, WHOLE, PUBLIC, "the abstract: experts trained apart serve together"),
    Expected(LOSS, OWN, PUBLIC, "the abstract: low ranks do so too"),
    Expected(LOSS, OWN, NEAR),
]
EXPERIMENT = Experiment(
    claim="Experts trained apart and joined by their routers' rows serve all their domains, and low ranks of them "
    "serve as well as the whole ones.",
    source="Pirchert et al., FlexMoRE, arXiv 2602.08818",
    find=find,
    steps=80,
    seeds=5,
    first=100,
    fails_by="routers that send a text to another text's expert, or differences that no low rank holds",
    fault=Fault(
        "the routers' rows are not joined",
        lambda: patch.object(lorac.FlexMoRE, "join", staticmethod(join_without_rows)),
    ),
)

if __name__ == "__main__":
    main(EXPERIMENT, "flexmore", __doc__)
