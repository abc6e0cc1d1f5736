"""Keys and values of branches, in the cache that transformers passes from call to call.

They are extra layers of that cache after the model's own, so selecting, repeating or cropping rows applies to them too.
This module imports transformers, so it is imported only for a call with such a cache.
"""

from typing import final

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from lorac.errors import Unavailable
from lorac.ir.slots.attention import BranchAttention, compute_attention, require_causal

_NEXT_STEP = "call generate, which starts with an empty DynamicCache, or give the whole sequence and no cache"


@final
class _BranchCacheLayer(DynamicLayer):
    """A cache layer with the keys and values of one attention of a branch.

    Args:
        place: the name of the attention.
    """

    def __init__(self, place: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # transformers'
        self.place = place


@final
class CachedBranchAttention(BranchAttention):
    """The attention of branches, for a call with a cache.

    Args:
        cache: the cache of the call, before the model appends to it.
    """

    def __init__(self, cache: Cache) -> None:
        self._cache = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
        self._length = int(self._cache.get_seq_length())

    def positions(self, x: Tensor) -> Tensor:
        """Return the positions of the tokens of x, which follow the tokens in the cache."""
        return torch.arange(self._length, self._length + x.shape[-2], device=x.device)

    def attend(
        self, place: str, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None, scale: float
    ) -> Tensor:
        """Append new keys and values to the cache, and attend to all of them."""
        require_causal(place, causal)
        keys, values = self._layer(place).update(k, v)
        return compute_attention(q, keys, values, causal=True, mask=mask, scale=scale, first=self._length)

    def _layer(self, place: str) -> _BranchCacheLayer:
        """Return the cache layer of an attention; refuse one whose length differs from that of the model's layers."""
        if not isinstance(self._cache, DynamicCache):
            raise Unavailable(
                f"a {type(self._cache).__name__} cannot hold the keys and values of the branch at '{place}'",
                next_step=_NEXT_STEP,
            )
        found = [layer for layer in self._cache.layers if isinstance(layer, _BranchCacheLayer) and layer.place == place]
        layer = found[0] if found else _BranchCacheLayer(place)
        if layer.get_seq_length() != self._length:
            raise Unavailable(
                f"the cache has {self._length} tokens, and the branch at '{place}' has {layer.get_seq_length()}",
                next_step=_NEXT_STEP,
            )
        if not found:
            self._cache.layers.append(layer)
        return layer
