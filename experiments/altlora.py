"""Does AltLoRA's loss fall faster than LoRA's and than both factors' preconditioned step, each at its best rate?

    python -m experiments.altlora [--seeds 5] [--steps 60] [--smoke]

A linear student of 64 x 64 with r = 8 learns a change of rank 16 with a falling spectrum. AltLoRA moves one factor a
step. At the end: how far the path of the weight spreads over five factorings (B·R, R⁻¹·A) of one start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import lorac
from experiments._study import Question, answer, log_mean, settings
from experiments._teacher import SIZE, side, weights
from lorac.training import AlternatingFactors, AltLoRA, Preconditioned

R = 8
B_FIRST = AlternatingFactors(first="B")


def sgd(parameters: list[torch.Tensor], rate: float) -> Any:
    return torch.optim.SGD(parameters, lr=rate)


def momentum(parameters: list[torch.Tensor], rate: float) -> Any:
    return torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def adamw(parameters: list[torch.Tensor], rate: float) -> Any:
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)


def preconditioned(compiled: Any, optimizer: Any) -> Any:
    return Preconditioned(compiled, optimizer, reg=1e-6)


QUESTIONS = [
    Question(
        "with momentum",
        {
            "LoRA": side(R, momentum),
            "preconditioned": side(R, momentum, preconditioned),
            "AltLoRA, A first": side(R, sgd, AltLoRA),
            "AltLoRA, B first": side(R, sgd, lambda c, o: AltLoRA(c, o, turns=B_FIRST)),
        },
        (0.3, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 50.0, 80.0),
        "LoRA",
        log_mean,
        "mean of log10(loss) over the steps",
    ),
    Question(
        "with second moments",
        {
            "LoRA": side(R, adamw),
            "preconditioned": side(R, adamw, preconditioned),
            "AltLoRA+, B first": side(R, sgd, lambda c, o: AltLoRA(c, o, plus=True, turns=B_FIRST)),
        },
        (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
        "LoRA",
        log_mean,
        "mean of log10(loss) over the steps",
    ),
]


def spread(rule: Any, steps: int) -> float:
    """Return the largest distance between the paths of W over five factorings, relative to how far W went."""
    base, goal = weights(0)
    paths = []
    for seed in range(5):
        model = nn.Sequential(nn.Linear(SIZE, SIZE, bias=False, dtype=torch.float64))
        model[0].weight.data.copy_(base)
        compiled: Any = lorac.compile(
            model, {"a": lorac.LoRA(r=R, alpha=R, targets=["0"])}, example_inputs=(torch.ones(2, SIZE).double(),)
        )
        own, generator = compiled.adapters["a"].tensors["0"], torch.Generator().manual_seed(7)
        turn = torch.eye(R).double() + 0.3 * seed * torch.randn(R, R, generator=generator).double()
        a, b = (torch.randn(*own[name].shape, generator=generator).double() / 8 for name in ("lora_A", "lora_B"))
        own["lora_A"].data.copy_(torch.linalg.solve(turn, a))
        own["lora_B"].data.copy_(b @ turn)
        optimizer = sgd(list(own.values()), 0.3)
        if rule is not None:
            rule(compiled.train(), optimizer)
        for _ in range(steps):
            optimizer.zero_grad()
            x = torch.randn(256, SIZE, generator=generator).double()
            (compiled(x) - x @ goal.t()).square().mean().backward()
            optimizer.step()
        paths.append((own["lora_B"] @ own["lora_A"]).detach())
    farthest = max(float((one - paths[0]).norm()) for one in paths)
    return farthest / float((paths[0] - b @ a).norm())


def main() -> None:
    given = settings(__doc__, "altlora", 60)
    answer(QUESTIONS, given)
    print("\nspread of the weight's path over five factorings of one start:")
    rules = {
        "LoRA": None,
        "AltLoRA": lambda c, o: AltLoRA(c, o, reg=0.0),
        "AltLoRA+": lambda c, o: AltLoRA(c, o, plus=True, reg=0.0),
    }
    for name, rule in rules.items():
        print(f"  {name:<34}{spread(rule, given.steps):>10.2g}")


if __name__ == "__main__":
    main()
