"""Start values of a method's tensors. Each function takes an ``InitContext`` and returns a tensor of its ``shape``."""

import math

import torch

from lorac.variants.params import Init, InitContext


def zeros(context: InitContext) -> torch.Tensor:
    """Fill the tensor with zeros."""
    return torch.zeros(context.shape)


def ones(context: InitContext) -> torch.Tensor:
    """Fill the tensor with ones."""
    return torch.ones(context.shape)


def constant(value: float) -> Init:
    """Fill the tensor with one value."""
    return lambda context: torch.full(context.shape, value)


def kaiming_uniform(context: InitContext) -> torch.Tensor:
    """Draw from U(−1/√fan_in, 1/√fan_in): kaiming_uniform with a = √5, where fan_in is the last axis."""
    return uniform(1 / math.sqrt(context.shape[-1]))(context)


def xavier_uniform(context: InitContext) -> torch.Tensor:
    """Draw from U(−a, a) with a = √(6 / (fan_in + fan_out))."""
    return uniform(math.sqrt(6 / sum(context.shape)))(context)


def xavier_normal(context: InitContext) -> torch.Tensor:
    """Draw from N(0, 2 / (fan_in + fan_out)), where the fans are the last two axes."""
    return normal((2 / sum(context.shape[-2:])) ** 0.5)(context)


def uniform(bound: float) -> Init:
    """Draw from U(−bound, bound)."""
    return lambda context: torch.empty(context.shape).uniform_(-bound, bound, generator=context.generator)


def normal(std: float) -> Init:
    """Draw from N(0, std²)."""
    return lambda context: torch.empty(context.shape).normal_(0, std, generator=context.generator)


def truncated_normal(std: float) -> Init:
    """Draw from N(0, std²), redrawing values farther than 2·std from zero."""

    def draw(context: InitContext) -> torch.Tensor:
        values = torch.empty(context.shape)
        return torch.nn.init.trunc_normal_(values, std=std, a=-2 * std, b=2 * std, generator=context.generator)

    return draw


def row_norms(context: InitContext) -> torch.Tensor:
    """Return the row norms of W, the start value of a magnitude (out,) for an update that starts at zero."""
    return torch.linalg.vector_norm(context.weight(), dim=1)
