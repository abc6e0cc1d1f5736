"""The contract for cached attention: a cache of keys and values, and what one call adds to it.

A graph with a cache computes only the new tokens of a call; the keys and values of earlier tokens are in the cache.
Rows of a batch are independent: each has its own length, brings its own number of tokens, and gets the answer that it
would get alone. Rows are padded on the right, and padding changes no answer.

A decoder may also attend to the outputs of an encoder. These are computed once, and stored for each row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The limits of a graph's cache.

    Attributes:
        limit: the longest sequence that the model's positions admit; None where they are computed for any.
        vocabulary: number of logits of a token.
        encodes: names of the inputs of an encoder, which must run first; empty without an encoder.
    """

    limit: int | None
    vocabulary: int
    encodes: tuple[str, ...] = ()

    def after(self, count: int) -> int | None:
        """Return how many tokens may follow ``count`` ones, the last of which nothing reads; None for any number."""
        return None if self.limit is None else self.limit + 1 - count


class KeyValueCache(ABC):
    """Keys and values of the rows of a batch (``Engine.new_cache``). Only one thread may use it at a time.

    Attributes:
        capacity: the most tokens of a row.
        lengths: number of tokens in each row.
        nbytes: size of its buffers.
    """

    capacity: int
    lengths: tuple[int, ...]
    nbytes: int

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Replace the rows by some of them, in this order; a row may be repeated or left out."""

    @abstractmethod
    def crop(self, lengths: Sequence[int]) -> None:
        """Drop each row's tokens from a length on, which is at most the present one."""

    @abstractmethod
    def grow(self, capacity: int) -> None:
        """Increase the capacity; the content stays."""

    @abstractmethod
    def copy(self) -> KeyValueCache:
        """Return another cache with the same content."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DecodeStep:
    """New tokens for the rows of a cache.

    Attributes:
        ids: token ids (rows, length), padded on the right.
        counts: number of new tokens of each row, 0 included.
        wanted: (rows, k): indices among the row's new tokens whose logits are returned; for a row without new tokens
            both are arbitrary.
    """

    ids: Tensor
    counts: Sequence[int]
    wanted: Tensor
