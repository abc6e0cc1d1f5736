"""Adapters that act from their invocation tokens on (aLoRA, Greenewald et al. 2025, arXiv 2504.12397)."""

from collections.abc import Mapping, Sequence

from torch import Tensor

Invocations = Mapping[str, tuple[int, ...]]
"""Name of an adapter -> its invocation tokens, of those adapters of a choice that have some."""


def find_start(tokens: Tensor, invocation: Sequence[int]) -> int | None:
    """Return the place of the last occurrence of invocation tokens in a row (length,), PEFT's rule; None without one.

    Source: peft.tuners.lora.variants.calculate_alora_offsets.
    """
    if len(tokens) < len(invocation):
        return None
    found = (tokens.unfold(0, len(invocation), 1) == tokens.new_tensor(invocation)).all(1).nonzero()
    return int(found[-1]) if len(found) else None
