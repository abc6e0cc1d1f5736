"""Adapters that act only from their invocation tokens on (aLoRA, Greenewald et al. 2025, arXiv 2504.12397)."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from lorac.errors import Unavailable

Invocations = Mapping[str, tuple[int, ...]]
"""Name of an adapter -> its invocation tokens, for the adapters of a choice that have them."""


def find_start(tokens: Tensor, invocation: Sequence[int]) -> int | None:
    """Return the index of the last occurrence of the invocation tokens in a row (length,) (PEFT's rule), or None.

    Source: peft.tuners.lora.variants.calculate_alora_offsets.
    """
    if len(tokens) < len(invocation):
        return None
    found = (tokens.unfold(0, len(invocation), 1) == tokens.new_tensor(invocation)).all(1).nonzero()
    return int(found[-1]) if len(found) else None


def no_prompt_error(names: Iterable[str], step: str = "") -> Unavailable:
    """Return the error for adapters with invocation tokens in a call without a prompt in which to find them."""
    return Unavailable(
        f"adapter '{next(iter(names))}' acts from its invocation tokens on, and this call does not look for these",
        next_step="call generate, with cache=True for target='onnxruntime'; or compile with target='eager', and give a "
        f"decoder input_ids= (rows, length) and no cache{step}",
    )
