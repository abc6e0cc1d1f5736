"""A small host in float64 for the tests of training rules."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
