"""Methods that lorac does not have, one for each way in which a term may run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import lorac
from lorac.variants.initialisers import kaiming_uniform, zeros
from tests.zoo import ZOO

MODEL = "plain_mlp"


@dataclass(frozen=True, kw_only=True)
class Tilted(lorac.WeightVariant):
    """``W' = g∘W + B·A``: low-rank, with a scale of the rows, and to be cut to a lower rank."""

    r: int = 4

    name: ClassVar[str] = "tilted"
    truncatable: ClassVar[float | None] = 0.0

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {
            "A": lorac.ParamSpec((self.r, site.in_features), kaiming_uniform),
            "B": lorac.ParamSpec((site.out_features, self.r), zeros),
            "g": lorac.ParamSpec((site.out_features,), lambda context: torch.ones(context.shape)),
        }

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return p.g[:, None] * W + p.B @ p.A


@dataclass(frozen=True, kw_only=True)
class Bent(lorac.WeightVariant):
    """``W' = W∘(1 + tanh(b)·sin W)``: dense, whatever is tried."""

    name: ClassVar[str] = "bent"

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {"b": lorac.ParamSpec((site.in_features,), zeros)}

    def weight(self, W: Tensor, p: Any) -> Tensor:
        return W * (1 + torch.tanh(p.b) * torch.sin(W))


@dataclass(frozen=True, kw_only=True)
class Beside(lorac.BranchVariant):
    """``y' = y + B·relu(A·x)``: a branch that is no change of a weight."""

    r: int = 3

    name: ClassVar[str] = "beside"

    def params(self, site: Any) -> dict[str, lorac.ParamSpec]:
        return {
            "A": lorac.ParamSpec((self.r, site.in_features), kaiming_uniform),
            "B": lorac.ParamSpec((site.out_features, self.r), zeros),
        }

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        return y + torch.relu(x @ p.A.T) @ p.B.T


def own_adapters(model: Any) -> dict[str, lorac.Adapter]:
    """An adapter of each, one that chains one of them behind lorac's own, and one of lorac's own, away from init."""
    targets = ("up", "down")
    fresh: dict[str, Any] = {
        "tilted": Tilted(targets=targets, bias="all"),
        "bent": Bent(targets=targets),
        "beside": Beside(targets=targets),
        "chained": lorac.Chain(parts=(lorac.LoRA(r=2), Tilted(r=1)), targets=targets),
        "plain": lorac.LoRA(r=2, targets=targets),
    }
    made = dict(lorac.compile(model, fresh).adapters)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in made.values():
            for tensor in adapter.parameters():
                tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return made


CHOICES: tuple[Any, ...] = (
    None,
    "tilted",
    "bent",
    "beside",
    "chained",
    {"tilted": 0.7, "beside": 0.4, "plain": 1.5},
    {"tilted": 0.5, "bent": -1.0},
    {"tilted": lorac.Active(1.0, rank=2)},
)


def answers(compiled: Any) -> list[Tensor]:
    """Return the outputs of a compiled model with each choice, swapped to and back."""
    inputs, found = ZOO[MODEL].inputs(seed=1, batch=3), []
    for choice in CHOICES:
        compiled.swap(choice)
        found.append(compiled(**inputs).clone())
    compiled.swap(None)
    return found
