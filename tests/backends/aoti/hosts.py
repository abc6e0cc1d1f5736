"""A small model and its adapters: two low-rank ones, and a branch whose parameters of zeros give NaN."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import lorac
from lorac import ParamSpec, SiteKind
from lorac.testing import adapter_away
from lorac.variants import initialisers


@dataclass(frozen=True, kw_only=True)
class Directed(lorac.BranchVariant):
    """y + m/‖m‖ ∘ tanh(y)."""

    name: ClassVar[str] = "aoti-directed"
    paper: ClassVar[str] = "none"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR})

    def params(self, site: Any) -> dict[str, ParamSpec]:
        return {"m": ParamSpec((site.out_features,), initialisers.ones)}

    def branch(self, x: Tensor, y: Tensor, p: Any, ctx: Any) -> Tensor:
        return y + p.m / p.m.norm() * torch.tanh(y)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"answer": self.down(nn.functional.gelu(self.up(x)))}


def make() -> tuple[nn.Module, dict[str, lorac.Adapter], Tensor]:
    """Return a model, adapters away from their initial values by name, and example inputs of free rows."""
    torch.manual_seed(0)
    model, x = Mlp().eval().requires_grad_(False), torch.randn(4, 3, 6)
    methods = {
        "lora": lorac.LoRA(r=3, targets=["up", "down"]),
        "dora": lorac.DoRA(r=2, targets=["up", "down"]),
        "branch": Directed(targets=["down"]),
    }
    adapters = dict(lorac.compile(model, methods, example_inputs=(x,), active=None).adapters)
    for adapter in adapters.values():
        for tensor in adapter.parameters():
            tensor.data.normal_(0, 0.4)
    return model, adapters, x


def make_convolution() -> tuple[nn.Module, lorac.Adapter, Tensor]:
    """Return a convolution of three channels, an adapter of rank 4, and example inputs of free rows."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), nn.Tanh()).eval(), torch.randn(2, 3, 8, 8)
    return model, adapter_away(lorac.LoRA(r=4, targets=["0"]), model, x, name="lora", seed=3), x


def make_pooled() -> tuple[nn.Module, lorac.Adapter, Tensor]:
    """Return an MLP on vectors, an adapter that scales what a linear layer takes, and an example of two rows."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8)).eval(), torch.randn(2, 6)
    methods = lorac.IA3(targets=["0", "2"], feedforward=["2"])
    return model, adapter_away(methods, model, x, name="ia3", seed=3), x
