"""A perceptron that reads characters: it knows Python's manual, and is to learn the standard library's code."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from experiments._kept import train_once
from experiments._study import Losses, adamw, trained

HIDDEN, ROWS, CONTEXT, HELD, TARGETS = 96, 64, 6, 4096, ("0", "2", "4")
ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A text, as the numbers of its characters."""

    text: Tensor

    def drawn(self, rows: int, seed: int) -> Batch:
        """Places in the text: the characters before each, one-hot and end to end, and the one that is there."""
        generator = torch.Generator().manual_seed(seed)
        places = torch.randint(len(self.text) - CONTEXT, (rows,), generator=generator)
        before = self.text[places[:, None] + torch.arange(CONTEXT)]
        return F.one_hot(before, len(ALPHABET)).flatten(1).float(), self.text[places + CONTEXT]

    def batches(self, count: int, seed: int) -> list[Batch]:
        """So many batches."""
        return [self.drawn(ROWS, 10_000 * seed + step) for step in range(count)]


def task(texts: Iterable[str]) -> Task:
    """Return the characters of the alphabet in some texts."""
    numbers = {character: number for number, character in enumerate(ALPHABET)}
    return Task(torch.tensor([numbers[c] for text in texts for c in text if c in numbers]))


@functools.cache
def tasks() -> tuple[Task, Task]:
    """Return Python's manual, and code of the standard library."""
    from pydoc_data.topics import topics

    prose = (topics[name] for name in sorted(topics))
    code = (inspect.getsource(module) for module in (argparse, dataclasses, inspect, textwrap, typing))
    return task(prose), task(code)


@functools.cache
def host(seed: int) -> nn.Module:
    """Return a perceptron that knows the manual."""
    torch.manual_seed(seed)

    def train(model: nn.Module) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for x, labels in tasks()[0].batches(600, seed):
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

    return train_once(__file__, f"{seed}", untrained(), train)


def untrained() -> nn.Module:
    """Return the perceptron as torch draws it."""
    wide = len(ALPHABET)
    layers = nn.Linear(CONTEXT * wide, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, wide)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


@torch.no_grad()
def held_loss(model: Callable[[Tensor], Tensor], task: Task) -> float:
    """Return the loss on places of a text that are always the same."""
    x, labels = task.drawn(HELD, seed=0)
    return float(F.cross_entropy(model(x), labels))


def learn(
    method: Any,
    rate: float,
    seed: int,
    steps: int,
    *,
    optimizer: Callable[[list[Tensor], float], Any] = adamw,
    rule: Callable[[Any, Any], Any] | None = None,
    text: Task | None = None,
    name: str = "a",
) -> tuple[Any, Losses]:
    """Let a method learn the code, or another text, on a host of ten; return the compiled model and the losses.

    The last loss is that of places which are always the same; the others are of what is being learned.
    """
    torch.manual_seed(seed)
    text = text or tasks()[1]
    compiled: Any = lorac.compile(host(seed % 10), {name: method}, example_inputs=(text.drawn(2, 0)[0],)).train()  # type: ignore[attr-defined]  # train() is nn.Module's
    made = optimizer([p for p in compiled.parameters() if p.requires_grad], rate)
    if rule is not None:
        rule(compiled, made)
    batches = text.batches(steps, seed + 2000)

    def step(index: int) -> float:
        if index == steps:
            return held_loss(compiled, text)
        x, labels = batches[index]
        made.zero_grad()
        loss = F.cross_entropy(compiled(x), labels)
        loss.backward()
        made.step()
        return float(loss.detach())

    return compiled, trained(step, steps)


def side(method: Callable[[], Any], **options: Any) -> Callable[[float, int, int], Losses]:
    """Return a side that learns the code with a method; ``options`` are those of ``learn``."""
    return lambda rate, seed, steps: learn(method(), rate, seed, steps, **options)[1]


def count_trained(method: Any) -> int:
    """Return how many values a method trains on the host."""
    compiled: Any = lorac.compile(untrained(), {"a": method})
    return sum(p.numel() for p in compiled.parameters() if p.requires_grad)
