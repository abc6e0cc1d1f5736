"""LoRA-SB beside LoRA-XS at equal rank and rate: the loss at every step, and how much alpha matters to each.

    python -m experiments.lora_sb [--seeds 5] [--steps 100] [--smoke]

A perceptron of two hidden layers tells the next character of Python's manual from the six before it; then adapters
make it do so for the standard library's code. Both train a core of r² values per layer by AdamW with a linear warm-up
of a fiftieth of the steps, as the authors' script has it; the loss is that of 4096 places in the code that are drawn
once. The first full step is taken at the first rate of the warm-up, so that a longer one makes the start smaller: with
a tenth, tried first on ten other seeds, all steps but the tenth, where that warm-up ends, were shown.

How much alpha matters is tried by two optimizers. Of SGD the paper's adjusted gradient is taken, divided by s²,
s = alpha/r: LoRA-SB's start and steps are then the same whatever alpha is. A step of AdamW does not know the size of
the gradient, and moves the weight by s times the rate. Ponkshe, Singhal et al. 2024, arXiv 2411.19557.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from experiments._finding import Expected, Finding, Table
from experiments._reader import TARGETS, Task, held_loss, host, tasks
from experiments._study import Experiment, deciding, main
from lorac.training.initialisation import LoRASB

ALPHAS = (0.25, 1.0, 4.0, 16.0)
"""Of the sweep, as multiples of the rank: the scales s."""
WARMUP = 0.02
RANK, RATE = 8, 1e-2
STEPS, MOST = (1, 2, 5, 10, 20, 50), 100
FLAT = 1e-4
"""The spread over alpha that float32's rounding of a training may come to."""


def begun(method: str, model: nn.Module, task: Task, seed: int, scale: float, given: argparse.Namespace) -> Any:
    """Return a compiled model with a LoRA-XS at its own start, or at LoRA-SB's."""
    variant = lorac.LoRAXS(r=RANK, alpha=scale * RANK, targets=TARGETS)
    if method == "xs":
        return lorac.compile(model, {"a": variant})
    start = LoRASB(
        lr=RATE, warmup=WARMUP, steps=given.steps, loss=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])
    )
    return lorac.compile(model, {"a": start(variant, model, task.batches(20, seed + 1000))})


def curve(
    method: str,
    model: nn.Module,
    task: Task,
    seed: int,
    given: argparse.Namespace,
    *,
    scale: float = 1,
    sgd: bool = False,
    all_steps: bool = False,
) -> Tensor:
    """Return the loss after the last step, infinity if it diverged; with ``all_steps`` that before each step too."""
    compiled = begun(method, model, task, seed, scale, given)
    cores = [p for p in compiled.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.SGD(cores, lr=0.5) if sgd else torch.optim.AdamW(cores, lr=RATE, weight_decay=0)
    warm = max(WARMUP * given.steps, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    losses = []
    for x, labels in task.batches(given.steps, seed + 2000):
        losses += [held_loss(compiled, task)] if all_steps else []
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), labels).backward()
        if sgd:
            for core in cores:
                core.grad /= scale**2
        optimizer.step()
        schedule.step()
        if not all(core.isfinite().all() for core in cores):
            left = given.steps + 1 - len(losses) if all_steps else 1
            return torch.tensor([*losses, *[math.inf] * left])
    return torch.tensor([*losses, held_loss(compiled, task)])


def measured(given: argparse.Namespace) -> dict[str, Tensor]:
    """Curves (seeds, steps + 1) by name: of both methods, and of both at every alpha by SGD and by AdamW."""
    code = tasks()[1]
    found: dict[str, list[Tensor]] = {}
    for seed in deciding(given):
        model = host(seed)

        def add(name: str, method: str, model: nn.Module = model, seed: int = seed, **told: Any) -> None:
            found.setdefault(name, []).append(curve(method, model, code, seed, given, **told))

        for method in ("xs", "sb"):
            add(method, method, all_steps=True)
            for scale in ALPHAS:
                add(f"{method} sgd {scale:g}", method, scale=scale, sgd=True)
                add(f"{method} adamw {scale:g}", method, scale=scale)
    return {name: torch.stack(curves) for name, curves in found.items()}


def find(given: argparse.Namespace) -> Finding:
    """Return the losses at some steps, and how far they depend on alpha."""
    curves = measured(given)
    names = {"xs": "LoRA-XS", "sb": "LoRA-SB"}
    last = curves["xs"].shape[1] - 1
    steps = sorted({0, *STEPS, last} & set(range(last + 1)))
    found = [
        Table(f"step {step}", "loss on code, alpha = r, AdamW", {names[m]: curves[m][:, step].tolist() for m in names})
        for step in steps
    ]
    optimizers = {"sgd": "SGD, g/s²", "adamw": "AdamW"}
    spreads = {
        f"{names[method]}, {optimizers[rule]}": spread([curves[f"{method} {rule} {s:g}"][:, -1] for s in ALPHAS])
        for method in names
        for rule in optimizers
    }
    table = Table(ALPHA, "range of the last losses, relative to the smallest, seed by seed", spreads)
    titles = {one.title for one in found} | {ALPHA}
    return Finding([*found, table], [one for one in EXPECTED if one.table in titles])


def spread(ends: list[Tensor]) -> list[float]:
    """Return how far the last losses of each seed lie apart, relative to the smallest."""
    losses = torch.stack(ends)
    return ((losses.amax(0) - losses.amin(0)) / losses.amin(0)).nan_to_num(math.inf).tolist()


ALPHA = "alpha from r/4 to 16 r"
EXPECTED = [
    *(Expected(f"step {step}", "LoRA-SB", "LoRA-XS", "section 5") for step in (*STEPS, MOST)),
    Expected(ALPHA, "LoRA-SB, SGD, g/s²", FLAT),
]
EXPERIMENT = Experiment(
    claim="Started at the best copy of the first full step, LoRA-XS learns faster at every step, whatever alpha is.",
    source="Ponkshe, Singhal et al., LoRA-SB, arXiv 2411.19557, sections 3 and 5",
    find=find,
    steps=MOST,
    first=100,
    fails_by="a start from which LoRA-XS learns no faster than from its own, or that depends on alpha",
)

if __name__ == "__main__":
    main(EXPERIMENT, "lora_sb", __doc__)
