"""Prefixes: texts that were computed before, kept between calls: what begins as one of them costs only the rest."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lorac.argument_types import check_type
from lorac.target.kv_cache import KeyValueCache

CacheKey = tuple[Any, ...]
"""A choice of adapters, and how often their tensors were written: keys and values depend on both."""


@dataclass(frozen=True, eq=False)
class _CachedPrompts:
    """One call's texts.

    Attributes:
        engine: what they were computed with.
        key: with which adapters.
        rows: the tokens of each.
        cache: holds them.
    """

    engine: weakref.ref[Any]
    key: CacheKey
    rows: Sequence[Tensor]
    cache: KeyValueCache

    def best(self, row: Tensor) -> tuple[int, int]:
        """How many tokens of a row these texts begin with, but for its last, and which of them does."""
        return max(
            (min(_common_prefix_length(own, row), row.shape[0] - 1), -place) for place, own in enumerate(self.rows)
        )


class PromptCache:
    """Texts kept between calls of ``compiled.generate(prefixes=...)``; those that were used longest ago go first.

    A call begins with what it finds of its prompts, and leaves its own texts. What one choice of adapters computed
    serves no other, since keys and values depend on it, and of an adapter that was trained since nothing is found.

    Args:
        bytes: how much the caches of all kept texts may take.
    """

    def __init__(self, bytes: int = 1 << 30) -> None:
        check_type(bytes, int, "the budget of lorac.PromptCache", next_step="give a number of bytes")
        self.bytes = bytes
        self._lock = threading.Lock()
        self._kept: list[_CachedPrompts] = []

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def used(self) -> int:
        """The bytes that the kept texts take."""
        return sum(kept.cache.nbytes for kept in self._kept)

    def clear(self) -> None:
        """Forget all of them."""
        with self._lock:
            self._kept = []

    def found(self, engine: Any, key: CacheKey, rows: Sequence[Tensor]) -> KeyValueCache | None:
        """A cache of one's own that holds what is known of some rows, of each but its last token; None for nothing.

        Args:
            engine: what computes.
            key: with which adapters.
            rows: the tokens of each.
        """
        with self._lock:
            chosen = max(self._of(engine, key), key=lambda kept: sum(kept.best(row)[0] for row in rows), default=None)
            if chosen is None:
                return None
            begun = [chosen.best(row) for row in rows]
            if not any(length for length, _ in begun):
                return None
            self._kept = [*(kept for kept in self._kept if kept is not chosen), chosen]
            cache = chosen.cache.copy()
        cache.select([-place for _, place in begun])
        cache.crop([length for length, _ in begun])
        return cache

    def keep(self, engine: Any, key: CacheKey, rows: Sequence[Tensor], cache: KeyValueCache) -> None:
        """Keep texts; those that they begin as, and what the budget does not admit, are forgotten.

        Args:
            engine: what computed them.
            key: with which adapters.
            rows: the tokens of each.
            cache: holds them, and nobody else uses it.
        """
        new = _CachedPrompts(weakref.ref(engine), key, [row.clone() for row in rows], cache)
        with self._lock:
            passed = [kept for kept in self._of(engine, key) if _is_covered(kept, new)]
            alive = [kept for kept in self._kept if kept not in passed and kept.engine() is not None]
            self._kept = [*alive, new]
            while self._kept and self.used > self.bytes:
                del self._kept[0]

    def _of(self, engine: Any, key: CacheKey) -> list[_CachedPrompts]:
        return [kept for kept in self._kept if kept.engine() is engine and kept.key == key]


def _common_prefix_length(one: Tensor, other: Tensor) -> int:
    """How many tokens two texts begin with both."""
    length = min(one.shape[0], other.shape[0])
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0, 0]) if differ.shape[0] else length


def _is_covered(old: _CachedPrompts, new: _CachedPrompts) -> bool:
    """Whether every text of the one begins some text of the other."""
    return all(any(_common_prefix_length(row, longer) == row.shape[0] for longer in new.rows) for row in old.rows)
