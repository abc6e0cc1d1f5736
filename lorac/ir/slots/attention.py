"""Attention in the formulas of branches: over whole sequences, or over a cache."""

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from lorac.errors import Unavailable


class BranchAttention(ABC):
    """The attention that a call's branches compute (``lorac.variants.base.Context``)."""

    @abstractmethod
    def positions(self, x: Tensor) -> Tensor:
        """Return the positions of the tokens of x (…, length, features); they broadcast to (…, length)."""

    @abstractmethod
    def attend(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Compute attention over the tokens of a call: (…, length, heads, size).

        Args:
            name: the name of this attention in the program.
            q, k, v, causal, mask, scale: as for ``Context.attend``.

        Raises:
            Unavailable: the sequence is cached, and the cache does not allow this attention.
        """


@final
class FullAttention(BranchAttention):
    """Attention in calls that contain whole sequences."""

    def positions(self, x: Tensor) -> Tensor:
        return torch.arange(x.shape[-2], device=x.device)

    def attend(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> Tensor:
        return compute_attention(q, k, v, causal=causal, mask=mask, scale=scale)


def compute_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float, first: int = 0
) -> Tensor:
    """Compute attention of queries to keys: (…, length, heads, size); keys may precede the first query.

    Args:
        q, k, v, causal, mask, scale: as for ``Context.attend``.
        first: index of the first query among the keys.
    """
    group = q.shape[-3] // k.shape[-3]
    k, v = (tensor.repeat_interleave(group, -3) if group > 1 else tensor for tensor in (k, v))
    plain = causal and mask is None and not first
    visible = None
    if not plain and (causal or mask is not None):
        queries, keys = (torch.arange(tensor.shape[-2], device=q.device) for tensor in (q, k))
        distance = (queries + first)[:, None] - keys
        visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
        if mask is not None:  # (…, 1, queries, keys); each query attends to itself, so that no row is empty
            visible = ((mask[..., None, None, :] != 0) & visible) | (distance == 0)
    return F.scaled_dot_product_attention(q, k, v, visible, is_causal=plain, scale=scale).transpose(-3, -2)


def require_causal(name: str, causal: bool) -> None:
    """Raise ``Unavailable`` if tokens of a cached sequence would attend to later tokens."""
    if not causal:
        raise Unavailable(
            f"the attention at '{name}' is not causal, and a cache holds no later tokens",
            next_step="compile with cache=False; eager generates without a cache for a method with mixes_tokens = True",
        )
