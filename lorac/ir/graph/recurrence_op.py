"""The recurrence of state-space models and linear attention as one op, whose state can be cached.

Each step decays a matrix, adds a product of a key and a value, and reads the matrix with a query. Mamba-2 decays each
head by one number, Mamba and Kimi's delta attention decay each feature, RG-LRU decays a matrix of one row; the delta
rules subtract from a value the state's answer to its key. ``recurrence`` defines the result; a target decides how it
computes it.
"""

import torch
from torch import Tensor


@torch.library.custom_op("lorac::recurrence", mutates_args=())
def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor | None, beta: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute ``S = exp(decay · rate) S + k ⊗ v`` and ``y = q S`` token by token.

    Args:
        q, k: queries and keys (batch, length, heads, size).
        v: values (batch, length, heads, width).
        decay: logarithms (batch, length, heads, size or 1, width or 1).
        rate: (heads, size, width): factor of the logarithms; None: 1.
        beta: (batch, length, heads): the gated delta rule (arXiv:2412.06464): the value is ``beta (v - k S)``, with
            the decayed state; None: ``v``.
        state: (batch, heads, size, width) before the first token; None: zeros.

    Returns:
        y (batch, length, heads, width), and the state behind the last token.
    """
    held = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[3]) if state is None else state
    outputs = []
    for token in range(k.shape[1]):
        key, value, logarithm = k[:, token, :, :, None], v[:, token, :, None], decay[:, token]
        held = held * torch.exp(logarithm if rate is None else logarithm * rate)
        if beta is not None:
            value = (value - key.transpose(2, 3) @ held) * beta[:, token, :, None, None]
        held = held + key * value
        outputs.append((q[:, token, :, None] @ held)[:, :, 0])
    return torch.stack(outputs, 1), held.clone()


@recurrence.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), v.new_empty((k.shape[0], *k.shape[2:], v.shape[3]))


RECURRENCE = recurrence._opoverload
STATE_OPERAND = 6
"""Index of the operand ``state`` of a recurrence."""
