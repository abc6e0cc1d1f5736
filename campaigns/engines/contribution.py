"""Adapters of random values whose share of a model's output is large enough for a wrong number to show.

``campaigns.engines`` and ``tests/session/test_conversion.py`` convert them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lorac
from lorac.testing.parity import CONTRIBUTION
from lorac.variants.base import Variant

TRIES = 20
WANTED = 0.2
"""The share of the base's output that an adapter of another size is expected to move."""


@torch.no_grad()
def contributing(
    model: nn.Module, variant: Variant, answer: Callable[[Callable[..., Any]], Tensor]
) -> tuple[lorac.Adapter, Tensor, Tensor]:
    """Return an adapter that moves the output by 5 to 50 %, with the outputs of the model without it and with it.

    Args:
        model: the base.
        variant: the method.
        answer: calls the model and returns the output that counts.

    Raises:
        AssertionError: no size of its values does.
    """
    size, share, low, high = 0.3, 0.0, 0.0, math.inf
    for _ in range(TRIES):
        compiled = lorac.compile(model, {"mine": variant})
        adapter, generator = compiled.adapters["mine"], torch.Generator().manual_seed(1)
        for tensor in filter(torch.is_floating_point, adapter.parameters()):
            tensor.add_(size * torch.randn(tensor.shape, generator=generator))
        base, given = (answer(partial(compiled, adapters=name)) for name in (None, "mine"))
        share = float(torch.dist(base, given) / base.norm())
        if CONTRIBUTION[0] < share < CONTRIBUTION[1]:
            return adapter, base, given
        low, high = (size, high) if share <= CONTRIBUTION[0] else (low, size)
        guess = size * min(4.0, max(0.25, WANTED / max(share, 1e-9)))
        # A steep effect makes guesses jump over the wanted share and back: their mean does not.
        size = guess if low < guess < high else math.sqrt(low * high)
    raise AssertionError(f"{variant.name} moves the output by {share:.1%}")
