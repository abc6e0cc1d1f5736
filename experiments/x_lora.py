"""Does a classifier that mixes three LoRAs for each token follow a switch of kind inside a sequence?

    python -m experiments.x_lora [--seeds 3] [--steps 200] [--smoke]

A small Llama over words learns prose, code and digits together, and a LoRA each of them, as in ``meteora_gates``. Then
X-LoRA's classifier alone is trained, on sequences of which one half is of one kind and the other of another. Held out
is the last tenth of each kind. Beside it stand the best single LoRA and all three at a third each. The weight is that
of the second half's kind, which the classifier cannot know before the switch.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._study import Experiment, Fault, main
from experiments.meteora_gates import KINDS, LENGTH, RANK, ROWS, Texts, batch, host, split, texts, told, train

HALF, PAIRS = LENGTH // 2, [*itertools.permutations(range(len(KINDS)), 2)]
BASE, BEST, UNIFORM, MIXED = "base", "best single LoRA", "a third of each", "X-LoRA"
BEFORE, AT, AFTER = "before the switch", "the first 4 tokens", "the last 16 tokens"
LOSS, WEIGHT = "loss on sequences that switch", "weight of the second kind's LoRA"


def switching(given: Texts, generator: torch.Generator, rows: int) -> tuple[Tensor, Tensor]:
    """Return sequences (rows·pairs, LENGTH) that switch kind in the middle, and the kind of each one's second half."""
    pieces = batch(given, generator, 2 * rows).unflatten(0, (len(KINDS), 2 * rows))
    ids = [torch.cat([pieces[a, :rows, :HALF], pieces[b, rows:, HALF:]], dim=1) for a, b in PAIRS]
    return torch.cat(ids), torch.tensor([b for _, b in PAIRS]).repeat_interleave(rows)


def study(seed: int, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Train the base, the LoRAs and the classifier; return the losses and the weights on held-out text."""
    known, held_out = split(texts())
    generator, model = torch.Generator().manual_seed(seed), host(seed)
    train(model, lambda: told(model, batch(known, generator)), 2 * steps, 3e-3)
    experts = []
    for kind in KINDS:
        one: Any = lorac.compile(model, {kind: lorac.LoRA(r=RANK, alpha=2 * RANK)})
        own = {kind: known[kind]}
        train(one, lambda one=one, own=own: told(one, batch(own, generator, 2 * ROWS)), steps // 2, 3e-3)  # type: ignore[misc]  # the defaults bind the loop's values
        experts.append(one.adapters[kind])
    mixture = lorac.XLoRA.from_loras(experts, hidden="model.norm", hidden_size=model.config.hidden_size, seed=seed)
    mixed: Any = lorac.compile(model, {"mixture": mixture}, aux=["router"])
    train(mixed, lambda: told(mixed, switching(known, generator, ROWS // 2)[0]), steps // 2, 1e-2)
    return measured(model, experts, mixed, held_out)


@torch.no_grad()
def measured(
    model: Any, experts: list[lorac.Adapter], mixed: Any, held_out: Texts
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the losses of all sides on the same sequences, and the weights around the switch."""
    ids, kinds = switching(held_out, torch.Generator().manual_seed(0), 2 * ROWS)
    single: Any = lorac.compile(model, {adapter.name: adapter for adapter in experts})

    def loss(choice: Any) -> float:
        return float(told(functools.partial(single, adapters=choice), ids))

    losses = {BASE: loss(None), BEST: min(map(loss, KINDS)), UNIFORM: loss(dict.fromkeys(KINDS, 1 / len(KINDS)))}
    losses[MIXED] = float(told(mixed, ids))
    weights = next(iter(mixed.aux["router"].values()))
    own = weights.gather(-1, kinds[:, None, None].expand(-1, LENGTH, 1))[..., 0]
    places = {BEFORE: own[:, :HALF], AT: own[:, HALF : HALF + 4], AFTER: own[:, -16:]}
    return losses, {place: float(part.mean()) for place, part in places.items()}


def find(given: argparse.Namespace) -> Finding:
    """Return the losses, and the weight of the second kind's LoRA around the switch."""
    found = [study(seed, given.steps) for seed in range(given.seeds)]
    return Finding(
        [
            Table(LOSS, "in nats a word", {side: [losses[side] for losses, _ in found] for side in found[0][0]}),
            Table(WEIGHT, "of 1", {place: [weights[place] for _, weights in found] for place in found[0][1]}),
        ],
        EXPECTED,
    )


def share(mixture: lorac.XLoRA, logits: Tensor) -> Tensor:
    """Return equal weights, which depend on the logits by nothing but their shape."""
    return (0 * logits).softmax(-1)


EXPECTED = [
    Expected(LOSS, MIXED, BEST, "the abstract"),
    Expected(LOSS, MIXED, UNIFORM, "the abstract"),
    Expected(WEIGHT, BEFORE, 1 / len(KINDS)),
    Expected(WEIGHT, 0.5, AFTER),
]
EXPERIMENT = Experiment(
    claim="A classifier on the hidden state mixes LoRAs token by token: it follows a switch inside a sequence, and is "
    "better there than any one of them and than equal shares.",
    source="Buehler and Buehler, X-LoRA, arXiv 2402.07148, abstract",
    find=find,
    steps=200,
    seeds=3,
    fails_by="weights that do not follow the switch, or a mixture that is no better than its best LoRA",
    fault=Fault("the classifier's weights are equal", lambda: patch.object(lorac.XLoRA, "scalings", share)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "x_lora", __doc__)
