"""The prompt cache: keys and values of earlier sequences, which prompts that begin alike use again."""

import functools
import threading
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lorac.argument_types import check_type
from lorac.ir.slots.choice import Choice
from lorac.target.engine import Engine
from lorac.target.kv_cache import KeyValueCache

CacheKey = tuple[str, Choice, Hashable]
"""A graph, a choice of adapters and the versions of their tensors: keys and values depend on all three."""


@dataclass(frozen=True, eq=False)
class _CachedPrompts:
    """The sequences of one call.

    Attributes:
        engine: computed them.
        key: the choice of adapters.
        rows: the tokens of each.
        cache: holds them.
    """

    engine: weakref.ref[Engine]
    key: CacheKey
    rows: Sequence[Tensor]
    cache: KeyValueCache

    def best_match(self, row: Tensor) -> tuple[int, int]:
        """Return how many tokens of a row, without its last, a sequence begins with, and the negated index of that."""
        return max((min(_common_prefix_length(own, row), row.shape[0] - 1), -i) for i, own in enumerate(self.rows))

    def is_obsolete(self, new: "_CachedPrompts") -> bool:
        """Return whether the entry is of no use once there is a new one.

        Its engine is gone, or its adapters were trained since, or each of its sequences begins one of the new.
        """
        if self.engine() is not new.engine() or self.key[:2] != new.key[:2]:
            return self.engine() is None
        if self.key != new.key:
            return True
        return all(any(_common_prefix_length(row, longer) == row.shape[0] for longer in new.rows) for row in self.rows)


class PromptCache:
    """Sequences kept between calls of ``compiled.generate(prompt_cache=...)``; the least recently used go first.

    A call begins with the cached beginnings of its prompts, and adds its own sequences. Sequences of one choice of
    adapters serve no other, since keys and values depend on it. Those of an adapter that was removed or trained since
    serve none, and go.

    Args:
        bytes: the most that all sequences may take.
    """

    def __init__(self, bytes: int = 1 << 30) -> None:
        check_type(bytes, int, "the budget of lorac.PromptCache", next_step="give a number of bytes")
        self.bytes = bytes
        self._lock = threading.Lock()
        self._entries: list[_CachedPrompts] = []

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used(self) -> int:
        """The bytes that the sequences take."""
        return sum(entry.cache.nbytes for entry in self._entries)

    def clear(self) -> None:
        """Forget all sequences."""
        with self._lock:
            self._entries = []

    def forget(self, engine: Engine, adapter: str) -> None:
        """Forget the sequences that an engine computed with an adapter."""
        with self._lock:
            self._entries = [
                entry for entry in self._entries if entry.engine() is not engine or adapter not in dict(entry.key[1])
            ]

    def find(self, engine: Engine, key: CacheKey, rows: Sequence[Tensor]) -> KeyValueCache | None:
        """Return a copy of the cached beginnings of some rows, without the last token of each; None for nothing.

        Args:
            engine: computes the rest.
            key: the choice of adapters.
            rows: the tokens of each row.
        """
        with self._lock:
            entries = [entry for entry in self._entries if entry.engine() is engine and entry.key == key]
            best = max(entries, key=lambda entry: sum(entry.best_match(row)[0] for row in rows), default=None)
            if best is None:
                return None
            matches = [best.best_match(row) for row in rows]
            if not any(length for length, _ in matches):
                return None
            self._entries = [*(entry for entry in self._entries if entry is not best), best]
        if engine.memory_budget is not None:
            engine.memory_budget.touch((id(self), id(best)))
        # Without the lock, since a copy may need the memory of other entries.
        cache = best.cache.copy([-index for _, index in matches])
        cache.crop([length for length, _ in matches])
        return cache

    def add(self, engine: Engine, key: CacheKey, rows: Sequence[Tensor], cache: KeyValueCache) -> None:
        """Keep sequences; forget those that begin them or are of older tensors, and the oldest beyond the budget.

        Args:
            engine: computed them.
            key: the choice of adapters.
            rows: the tokens of each row.
            cache: holds them; nothing else may use it.
        """
        new = _CachedPrompts(weakref.ref(engine), key, [row.clone() for row in rows], cache)
        if engine.memory_budget is None or cache.charge is None:
            self._take(new)
        else:
            drop = functools.partial(_drop, weakref.ref(self), weakref.ref(new))
            engine.memory_budget.keep((id(self), id(new)), cache.charge, functools.partial(self._take, new), drop)

    def _take(self, new: _CachedPrompts) -> None:
        with self._lock:
            self._entries = [*(entry for entry in self._entries if not entry.is_obsolete(new)), new]
            while self._entries and self.used > self.bytes:
                del self._entries[0]

    def drop(self, entry: _CachedPrompts) -> None:
        """Forget one call's sequences, where others need the memory."""
        with self._lock:
            self._entries = [other for other in self._entries if other is not entry]


def _drop(owner: Callable[[], PromptCache | None], entry: Callable[[], _CachedPrompts | None]) -> None:
    """Make a prompt cache forget an entry, if both still exist."""
    cache, found = owner(), entry()
    if cache is not None and found is not None:
        cache.drop(found)


def _common_prefix_length(one: Tensor, other: Tensor) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    length = min(one.shape[0], other.shape[0])
    differ = (one[:length] != other[:length]).nonzero()
    return int(differ[0, 0]) if differ.shape[0] else length
