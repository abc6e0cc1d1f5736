"""Keys and values of branches beside those of the host, in the cache that transformers hands from call to call.

They are layers of that cache, behind the host's, so that whatever selects, repeats or crops its rows has them follow.
This module imports transformers, so it is imported where a call brings such a cache.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from lorac.errors import Unavailable
from lorac.ir.slots.attention import BranchAttention, compute_attention, require_causal

_NEXT_STEP = "call generate, which begins with an empty dynamic one of its own, or give the whole text and no cache"


@final
class _BranchCacheLayer(DynamicLayer):
    """What one attention of a branch keeps.

    Args:
        place: which attention.
    """

    def __init__(self, place: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self.place = place


@final
class CachedBranchAttention(BranchAttention):
    """What the branches of a call attend by that goes on with a cache.

    Args:
        cache: the host's, before the call adds to it.
    """

    def __init__(self, cache: Cache) -> None:
        own = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        self._cache, self._held = own, int(own.get_seq_length())

    def positions(self, x: Tensor) -> Tensor:
        """As ``Attention`` says."""
        return torch.arange(self._held, self._held + x.shape[-2], device=x.device)

    def attend(
        self, place: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> Tensor:
        """As ``Attention`` says."""
        require_causal(place, causal)
        keys, values = self._layer(place).update(k, v)
        return compute_attention(q, keys, values, causal=True, mask=mask, scale=scale, first=self._held)

    def _layer(self, place: str) -> _BranchCacheLayer:
        """What an attention keeps in the cache, of as many tokens as the host's keep.

        Raises:
            Unavailable: the cache takes no more layers, or was filled without this branch.
        """
        if not isinstance(self._cache, DynamicCache):
            raise Unavailable(
                f"a {type(self._cache).__name__} keeps nothing of what '{place}' attends to", next_step=_NEXT_STEP
            )
        found = [layer for layer in self._cache.layers if isinstance(layer, _BranchCacheLayer) and layer.place == place]
        layer = found[0] if found else _BranchCacheLayer(place)
        if layer.get_seq_length() != self._held:
            raise Unavailable(
                f"the cache holds {self._held} tokens, and of these the branch at '{place}' kept "
                f"{layer.get_seq_length()}",
                next_step=_NEXT_STEP,
            )
        if not found:
            self._cache.layers.append(layer)
        return layer
