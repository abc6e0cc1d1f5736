"""A simulated federation: ten clients with different labels and ranks train one classifier by stacked factors.

    python -m examples.federated [rounds]

Each round the clients train LoRAs of their own ranks; stacked (``lorac.merging.FederatedStack``) they add up exactly,
where the means of their factors, padded with zeros to one rank, do not.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from lorac.merging import FederatedStack
from lorac.merging.federation import Contribution

CLASSES, WIDTH, SAMPLES = 10, 24, 60
RANKS = (8, 4, 4, 2, 2, 2, 1, 1, 1, 1)


@dataclass
class Simulation:
    """Per round: the accuracy on all classes, the error of the stack, and that of the mean of the factors."""

    accuracies: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    errors_of_means: list[float] = field(default_factory=list)


def make_data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points around a centre for each class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(CLASSES * SAMPLES) % CLASSES
    return centres[labels] + 0.9 * torch.randn(len(labels), WIDTH, generator=generator), labels


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, CLASSES))


def changes(contribution: Contribution) -> dict[str, Tensor]:
    """Return the change that a client adds to each weight."""
    return {path: change.b.mT @ change.a.mT for path, change in lorac.factors(contribution.adapter).items()}


def stacking_error(contributions: dict[str, Contribution], stack: lorac.Adapter) -> float:
    """How far the stack is from Σ p·ΔW, in the dtype that both are computed in."""
    total = sum(one.weight for one in contributions.values())
    off = 0.0
    for path, change in lorac.factors(stack).items():
        exact = sum(one.weight / total * changes(one)[path].double() for one in contributions.values())
        off += float((change.b.mT.double() @ change.a.mT.double() - exact).square().sum())
    return off**0.5


def padding_error(contributions: dict[str, Contribution]) -> float:
    """How far the product of mean factors, padded with zeros, is from Σ p·ΔW."""
    total, off = sum(one.weight for one in contributions.values()), 0.0
    shares = {name: one.weight / total for name, one in contributions.items()}
    pairs = {name: lorac.factors(one.adapter) for name, one in contributions.items()}
    for path in next(iter(pairs.values())):
        width = max(pair[path].rank for pair in pairs.values())
        a = sum(shares[name] * F.pad(pair[path].a, (0, width - pair[path].rank)) for name, pair in pairs.items())
        b = sum(shares[name] * F.pad(pair[path].b.mT, (0, width - pair[path].rank)) for name, pair in pairs.items())
        exact = sum(shares[name] * (pair[path].b.mT @ pair[path].a.mT) for name, pair in pairs.items())
        off += float((b @ a.mT - exact).square().sum())
    return off**0.5


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    x, y = make_data(seed=1)
    return float((model(x).argmax(-1) == y).float().mean())


def simulate(rounds: int = 5, steps: int = 20) -> Simulation:
    """Train for some rounds; every client has two labels only."""
    model, (x, y), found = make_model(), make_data(), Simulation()
    methods = {f"client-{k}": lorac.LoRA(r=r, alpha=2 * r, targets=["0", "2"]) for k, r in enumerate(RANKS)}
    own = {client: (y == k) | (y == (k + 1) % CLASSES) for k, client in enumerate(methods)}
    weights = {client: int(mask.sum()) * (1 + k % 3) for k, (client, mask) in enumerate(own.items())}

    def train(client: str, compiled: nn.Module) -> None:
        optimizer = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=0.02)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(compiled(x[own[client]]), y[own[client]]).backward()
            optimizer.step()

    stack = FederatedStack()
    for _ in range(rounds):
        stack = stack.train_round(model, methods, train, weights)
        last = dict(stack.rounds[-1])
        alone = FederatedStack().add_round({name: one.adapter for name, one in last.items()}, weights).merged()
        found.errors.append(stacking_error(last, alone))
        found.errors_of_means.append(padding_error(last))
        found.accuracies.append(accuracy(lorac.merge_into(model, stack.merged())))
    return found


def main() -> None:
    found = simulate(*map(int, sys.argv[1:]))
    print("round  accuracy  error of the stack  error of padded means")
    for number, row in enumerate(zip(found.accuracies, found.errors, found.errors_of_means, strict=True), 1):
        print(f"{number:5}  {row[0]:8.3f}  {row[1]:18.1e}  {row[2]:21.3f}")


if __name__ == "__main__":
    main()
