"""The contract for text that grows: a cache of keys and values, and what one call adds to it.

A graph that keeps a cache computes only the tokens a call brings; what its attention needs of those before, the cache
holds. Rows of a batch are independent: each has its own length, brings its own number of tokens, and gives what it
would give alone. Rows are padded on the right inside, and nothing is computed from what pads them.

A decoder may attend to what an encoder read, too. That is encoded once for a text, and kept beside it for each row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What a graph's cache can hold.

    Attributes:
        limit: the longest text that the model's positions admit; None where they are computed for any.
        vocabulary: how many logits a token has.
        encodes: names of the inputs of an encoder, which is to be run first; none where there is no encoder.
    """

    limit: int | None
    vocabulary: int
    encodes: tuple[str, ...] = ()

    def after(self, count: int) -> int | None:
        """How many tokens may follow a text of so many, the last of which nothing reads; None for any number."""
        return None if self.limit is None else self.limit + 1 - count


class KeyValueCache(ABC):
    """Keys and values of the rows of a batch; an engine makes it (``Engine.new_cache``). One thread uses it at a time.

    Attributes:
        capacity: the most tokens a row may have.
        lengths: how many tokens each row holds.
        nbytes: what its buffers take.
    """

    capacity: int
    lengths: tuple[int, ...]
    nbytes: int

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Let the rows be these of the present ones, in this order; one may come several times, or be left out."""

    @abstractmethod
    def crop(self, lengths: Sequence[int]) -> None:
        """Forget each row's tokens from a length on, none of which is above the present one."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Admit longer rows; what they hold stays."""

    @abstractmethod
    def copy(self) -> KeyValueCache:
        """Another cache that holds the same."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodeStep:
    """What a call adds to the rows of a cache.

    Attributes:
        ids: token ids (rows, length), padded on the right.
        counts: how many of them each row brings, from 0 on.
        wanted: (rows, k): the places among the row's own new tokens whose logits are asked for; of a row that brings
            none they may be any, and so are its logits.
    """

    ids: Tensor
    counts: Sequence[int]
    wanted: Tensor
