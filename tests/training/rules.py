"""A small host in float64 for the tests of training rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import lorac
from tests.training.loops import trained


def linear(columns: int, out: int, *, seed: int = 0) -> nn.Module:
    """One bias-free layer of float64 called ``site``."""
    model = nn.Sequential()
    model.add_module("site", nn.Linear(columns, out, bias=False, dtype=torch.float64))
    weight = torch.randn(out, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    model.site.weight.data.copy_(weight)
    return model


def drawn(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tensor(values: Any) -> Tensor:
    """Float64."""
    return torch.tensor(values, dtype=torch.float64)


def pair(a: Tensor, b: Tensor, *, scale: float = 1.0, **optimizer: Any) -> tuple[Any, Tensor, Tensor, Any]:
    """``linear`` with s·B·A next to it in training mode: compiled, A, B, and SGD over both."""
    variant = lorac.LoRA(r=len(a), alpha=scale * len(a), targets=("site",))
    adapter = lorac.Adapter("a", variant, {"site": {"lora_A": a, "lora_B": b}})
    compiled: Any = lorac.compile(linear(a.shape[1], len(b)), {"a": adapter})
    own = compiled.train().adapters["a"].tensors["site"]
    return compiled, own["lora_A"], own["lora_B"], torch.optim.SGD(trained(compiled), **{"lr": 1.0, **optimizer})


def backward(compiled: Any, gradient: Tensor) -> None:
    """Have ∂L/∂W at ``site`` be ``gradient`` (out, in)."""
    (compiled(torch.eye(gradient.shape[1], dtype=torch.float64)) * gradient.t()).sum().backward()
