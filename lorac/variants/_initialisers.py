"""Start values shared by variants. Each takes an ``InitContext`` and returns a float32 tensor of its shape."""

from __future__ import annotations

import math

import torch

from lorac.variants.params import Init, InitContext


def zeros(context: InitContext) -> torch.Tensor:
    """All zeros."""
    return torch.zeros(context.shape)


def kaiming_uniform(context: InitContext) -> torch.Tensor:
    """U(−1/√fan_in, 1/√fan_in): kaiming_uniform with a = √5, fan_in the last axis."""
    bound = 1 / math.sqrt(context.shape[-1])
    return torch.empty(context.shape).uniform_(-bound, bound, generator=context.generator)


def xavier_uniform(context: InitContext) -> torch.Tensor:
    """U(−a, a) with a = √(6 / (fan_in + fan_out))."""
    bound = math.sqrt(6 / sum(context.shape))
    return torch.empty(context.shape).uniform_(-bound, bound, generator=context.generator)


def uniform(bound: float) -> Init:
    """U(−bound, bound)."""

    def make(context: InitContext) -> torch.Tensor:
        return torch.empty(context.shape).uniform_(-bound, bound, generator=context.generator)

    return make


def normal(std: float) -> Init:
    """N(0, std²)."""

    def make(context: InitContext) -> torch.Tensor:
        return torch.empty(context.shape).normal_(0, std, generator=context.generator)

    return make


def row_norms(context: InitContext) -> torch.Tensor:
    """The row norms of W (out,): where a magnitude starts whose update is zero at first."""
    return torch.linalg.vector_norm(context.weight(), dim=1)
