"""LoRA-SB beside LoRA-XS at equal rank and rate: the loss at every step, and how much alpha matters to each.

    python -m experiments.lora_sb [--seeds 5] [--steps 100] [--rank 8] [--lr 1e-2] [--smoke]

A perceptron of two hidden layers tells the next character of Python's manual from the six before it; then adapters
make it do so for the standard library's code. Both train a core of r² values per layer by AdamW with a linear warm-up;
the loss is that of 4096 places in the code that are drawn once.

How much alpha matters is tried by two optimizers. Of SGD the paper's adjusted gradient is taken, divided by s²,
s = alpha/r: LoRA-SB's start and steps are then the same whatever alpha is. A step of AdamW does not know the size of
the gradient, and moves the weight by s times the rate. Ponkshe, Singhal et al. 2024, arXiv 2411.19557.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from lorac.training.initialisation import LoRASB

HIDDEN, ROWS, CONTEXT, HELD, TARGETS = 96, 64, 6, 4096, ("0", "2", "4")
ALPHABET = "".join(map(chr, range(32, 127))) + "\n"
ALPHAS = (0.25, 1.0, 4.0, 16.0)
"""Of the sweep, as multiples of the rank: the scales s."""
WARMUP = 0.1
FLAT = 1e-4
"""The spread over alpha that float32's rounding of a training may come to."""
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


def tasks() -> tuple[Task, Task]:
    """Python's manual, and code of the standard library."""
    from pydoc_data.topics import topics

    prose = (topics[name] for name in sorted(topics))
    code = (inspect.getsource(module) for module in (argparse, dataclasses, inspect, textwrap, typing))
    return task(prose), task(code)


def pretrained(task: Task, seed: int) -> nn.Module:
    """Return a perceptron that knows the manual."""
    torch.manual_seed(seed)
    wide = len(ALPHABET)
    layers = nn.Linear(CONTEXT * wide, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, wide)
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for x, labels in task.batches(600, seed):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model


def begun(method: str, model: nn.Module, task: Task, seed: int, scale: float, given: argparse.Namespace) -> Any:
    """Return a compiled model with a LoRA-XS at its own start, or at LoRA-SB's."""
    variant = lorac.LoRAXS(r=given.rank, alpha=scale * given.rank, targets=TARGETS)
    if method == "xs":
        return lorac.compile(model, {"a": variant})
    start = LoRASB(
        lr=given.lr, warmup=WARMUP, steps=given.steps, loss=lambda m, batch: F.cross_entropy(m(batch[0]), batch[1])
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
    """Return the loss after the last step; with ``all_steps`` that before each step too."""
    compiled = begun(method, model, task, seed, scale, given)
    cores = [p for p in compiled.parameters() if p.requires_grad]
    optimizer: Any = torch.optim.SGD(cores, lr=0.5) if sgd else torch.optim.AdamW(cores, lr=given.lr, weight_decay=0)
    warm = max(WARMUP * given.steps, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm))
    losses = []
    for x, labels in task.batches(given.steps, seed + 2000):
        losses += [_loss(compiled, task)] if all_steps else []
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), labels).backward()
        if sgd:
            for core in cores:
                core.grad /= scale**2
        optimizer.step()
        schedule.step()
    return torch.tensor([*losses, _loss(compiled, task)])


@torch.no_grad()
def _loss(compiled: Any, task: Task) -> float:
    x, labels = task.drawn(HELD, seed=0)
    return float(F.cross_entropy(compiled(x), labels))


def measured(given: argparse.Namespace) -> dict[str, Tensor]:
    """Curves (seeds, steps + 1) by name: of both methods, and of both at every alpha by SGD and by AdamW."""
    prose, code = tasks()
    found: dict[str, list[Tensor]] = {}
    for seed in range(given.seeds):
        model = pretrained(prose, seed)

        def add(name: str, method: str, model: nn.Module = model, seed: int = seed, **told: Any) -> None:
            found.setdefault(name, []).append(curve(method, model, code, seed, given, **told))

        for method in ("xs", "sb"):
            add(method, method, all_steps=True)
            for scale in ALPHAS:
                add(f"{method} sgd {scale:g}", method, scale=scale, sgd=True)
                add(f"{method} adamw {scale:g}", method, scale=scale)
    return {name: torch.stack(curves) for name, curves in found.items()}


def report(found: dict[str, Tensor], say: Callable[[str], None] = print) -> None:
    """Both tables, and what they decide."""
    xs, sb = found["xs"], found["sb"]
    seeds, last = len(xs), xs.shape[1] - 1
    say(f"LoRA-SB against LoRA-XS, {seeds} seeds, {last} steps: loss on code, mean ± standard error, alpha = r, AdamW")
    say(f"{'step':>6} {'LoRA-XS':>16} {'LoRA-SB':>16}  {'seeds below':>11}")
    for step in sorted({0, 1, 2, 5, 10, 20, 50, last} & set(range(last + 1))):
        below = int((sb[:, step] < xs[:, step]).sum())
        say(f"{step:>6} {_spread(xs[:, step]):>16} {_spread(sb[:, step]):>16}  {below:>5} of {len(xs)}")
    say(verdict(xs, sb))
    say("")
    say("last loss by alpha")
    say(f"{'':>20} " + " ".join(f"{f'{scale:g} r':>16}" for scale in ALPHAS) + f" {'spread':>8}")
    for method in ("xs", "sb"):
        for rule in ("sgd", "adamw"):
            ends = [found[f"{method} {rule} {scale:g}"][:, -1] for scale in ALPHAS]
            row = " ".join(f"{_spread(end):>16}" for end in ends)
            say(f"{f'LoRA-{method.upper()} {_NAMES[rule]}':>20} {row} {spread(ends):>8.1e}")


_NAMES = {"sgd": "SGD, g/s²", "adamw": "AdamW"}


def verdict(xs: Tensor, sb: Tensor) -> str:
    """At how many steps LoRA-SB lies below LoRA-XS, and at how many by two standard errors and more."""
    gap = xs - sb
    error = gap.std(0) / len(gap) ** 0.5
    below, apart = int((gap.mean(0) > 0).sum()), int((gap.mean(0) > 2 * error).sum())
    steps = gap.shape[1]
    said = f"LoRA-SB is below at {below} of {steps} steps, by more than two standard errors at {apart}"
    return said if apart == steps else f"{said}; at {steps - apart} they do not separate"


def spread(ends: Sequence[Tensor]) -> float:
    """How far the means over seeds lie apart, relative to the smallest."""
    means = torch.stack([end.mean() for end in ends])
    return float((means.max() - means.min()) / means.min())


def _spread(values: Tensor) -> str:
    return f"{float(values.mean()):.4f} ± {float(values.std()) / len(values) ** 0.5:.4f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--smoke", action="store_true", help="two seeds and two steps: seconds, and no figures")
    given = parser.parse_args(arguments)
    if given.smoke:
        given.seeds, given.steps = 2, 2
    report(measured(given))


if __name__ == "__main__":
    main()
