"""Teacher and student: one linear layer of 64 x 64 whose weight is off by a change of rank 16, its spectrum falling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lorac
from experiments._study import Losses, Side, adamw, trained

SIZE = 64
Ruled = Callable[[Any, Any], Any]
Made = Callable[[list[Tensor], float], Any]
Teacher = Callable[[int], tuple[Tensor, Tensor]]


def weights(seed: int, *, rank: int = 16, ratio: float = 0.7) -> tuple[Tensor, Tensor]:
    """W of the student and of the teacher, float64; σ_i = ratio^i of the difference, times 4."""
    generator = torch.Generator().manual_seed(seed)
    base, u, v = (torch.randn(SIZE, SIZE, dtype=torch.float64, generator=generator) for _ in range(3))
    sizes = 4 * ratio ** torch.arange(rank, dtype=torch.float64)
    change = torch.linalg.qr(u).Q[:, :rank] * sizes @ torch.linalg.qr(v).Q[:, :rank].t()
    base = base / SIZE**0.5
    return base, base + change


def learn(
    method: Any,
    rate: float,
    seed: int,
    steps: int,
    *,
    optimizer: Made = adamw,
    rule: Ruled | None = None,
    teacher: Teacher = weights,
    name: str = "a",
) -> tuple[Any, Losses]:
    """Let a student learn from 256 samples a step, drawn by the seed; return the compiled model and the losses."""
    base, goal = teacher(seed)
    model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False, dtype=torch.float64))
    model[0].weight.data.copy_(base)
    compiled: Any = lorac.compile(model, {name: method}, example_inputs=(torch.ones(2, SIZE).double(),))
    compiled.train()
    if not isinstance(method, lorac.Adapter):
        _draw(compiled, seed)
    made = optimizer([p for p in compiled.parameters() if p.requires_grad], rate)
    if rule is not None:
        rule(compiled, made)
    generator = torch.Generator().manual_seed(1000 + seed)

    def step(index: int) -> float:
        x = torch.randn(256, SIZE, dtype=torch.float64, generator=generator)
        loss = (compiled(x) - x @ goal.t()).square().mean()
        made.zero_grad()
        loss.backward()
        made.step()
        return float(loss.detach())

    return compiled, trained(step, steps)


def side(method: Any, optimizer: Made = adamw, rule: Ruled | None = None, *, teacher: Teacher = weights) -> Side:
    """Return a side that learns from the teacher with a method."""
    return lambda rate, seed, steps: learn(method, rate, seed, steps, optimizer=optimizer, rule=rule, teacher=teacher)[
        1
    ]


@torch.no_grad()
def change_of(compiled: Any, choice: Any = "a") -> Tensor:
    """Return the change (64, 64) that a choice of adapters makes of a student's weight."""
    x = torch.eye(SIZE, dtype=torch.float64)
    compiled.eval()
    return (compiled(x, adapters=choice) - compiled(x, adapters=None)).mT


def missed(change: Tensor, wanted: Tensor) -> float:
    """Return the part of a wanted change that another one lacks: the squared distance over the squared size."""
    return float((change - wanted).square().sum() / wanted.square().sum())


def _draw(compiled: Any, seed: int) -> None:
    """Another start of A for every seed."""
    generator = torch.Generator().manual_seed(2000 + seed)
    with torch.no_grad():
        for own in compiled.adapters["a"].tensors.values():
            if "lora_A" in own:
                own["lora_A"].uniform_(-(SIZE**-0.5), SIZE**-0.5, generator=generator)
