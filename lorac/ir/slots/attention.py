"""How the branches of a call attend: to a whole text, or to one that grows, where whoever runs them keeps a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
import torch.nn.functional as F

from lorac.errors import Unavailable

Tensor = torch.Tensor


class BranchAttention(ABC):
    """What the branches of a call attend by (``lorac.variants.base.Context``)."""

    @abstractmethod
    def positions(self, x: Tensor) -> Tensor:
        """Where the tokens of x (…, length, features) are in their texts: what broadcasts to (…, length)."""

    @abstractmethod
    def attend(
        self, place: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Attention of the tokens of a call, (…, length, heads, size).

        Args:
            place: which of the program's it is.
            q, k, v, causal, mask, scale: as ``Context.attend``'s.

        Raises:
            Unavailable: the text grows, and no cache holds what is asked for.
        """


@final
class FullAttention(BranchAttention):
    """Attention where a call has all of its texts."""

    def positions(self, x: Tensor) -> Tensor:
        """As ``Attention`` says."""
        return torch.arange(x.shape[-2], device=x.device)

    def attend(
        self, place: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> Tensor:
        """As ``Attention`` says."""
        return compute_attention(q, k, v, causal=causal, mask=mask, scale=scale)


def compute_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float, first: int = 0
) -> Tensor:
    """Attention of queries to keys, the first of which may come before the first query: (…, length, heads, size).

    Args:
        q, k, v, causal, mask, scale: as ``Context.attend``'s.
        first: the place of the first query among the keys.
    """
    shared = q.shape[-3] // k.shape[-3]
    k, v = (part.repeat_interleave(shared, -3) if shared > 1 else part for part in (k, v))
    plain = causal and mask is None and not first
    seen = None if plain or (mask is None and not causal) else _attention_mask(q, k, causal, mask, first)
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=plain, scale=scale).transpose(-3, -2)


def _attention_mask(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, first: int) -> Tensor:
    """Which keys each query attends to (…, 1, queries, keys); itself always, so that no row is empty."""
    queries, keys = (torch.arange(part.shape[-2], device=q.device) for part in (q, k))
    apart = (queries + first)[:, None] - keys
    seen = apart >= 0 if causal else torch.ones_like(apart, dtype=torch.bool)
    return seen if mask is None else ((mask[..., None, None, :] != 0) & seen) | (apart == 0)


def require_causal(place: str, causal: bool) -> None:
    """Raise ``Unavailable`` where a token of a text that grows was to attend to those that come after it."""
    if not causal:
        raise Unavailable(
            f"the attention at '{place}' is to tokens that come later, too, of which a cache holds none",
            next_step="compile with cache=False; where a method says mixes_tokens = True, "
            "eager generates by whole texts",
        )
