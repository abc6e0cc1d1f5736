"""Many readers or one writer: calls of a fused engine read its weights, a swap writes them.

Whoever is interrupted, by Ctrl-C or by an exception from a signal, lets go of what it holds wherever that happens: all
that is ever held is a lock of the interpreter's own, in a ``with`` of its own. A condition or a context manager written
in Python would not do, since an interrupt may come between its own lines.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")
_LOCKS_PER_FRAME = 4


class ReadWriteLock:
    """A lock per reading thread, and a gate that a writer closes before it takes them all.

    Writers go first: one that waits holds back new readers, so a swap is not starved by steady calls.
    """

    def __init__(self) -> None:
        self._gate = threading.RLock()
        self._mine = threading.local()
        self._readers: tuple[weakref.ref[Any], ...] = ()
        """The locks of threads that have read; they go with their threads."""

    def reading(self) -> Any:
        """What holds off writers, for a ``with``; waits for a writer that is writing or waits to write."""
        own = getattr(self._mine, "lock", None)
        if own is None:
            own = self._new_reader()
        with self._gate:
            return own

    def writing(self, work: Callable[[], T]) -> T:
        """Wait for running readers, hold new ones, and do what is to be done alone."""
        with self._gate:
            return _run_with_locks([lock for ref in self._readers if (lock := ref()) is not None], work)

    def _new_reader(self) -> Any:
        own = threading.RLock()
        with self._gate:
            self._readers = (*(ref for ref in self._readers if ref() is not None), weakref.ref(own))
            self._mine.lock = own
        return own


def _run_with_locks(locks: Sequence[Any], work: Callable[[], T]) -> T:
    """Do some work with all these locks held, a few at each depth of the stack."""
    if not locks:
        return work()
    first, *rest = locks[:_LOCKS_PER_FRAME]
    one, two, three = (*rest, first, first, first)[: _LOCKS_PER_FRAME - 1]
    with first, one, two, three:
        return _run_with_locks(locks[_LOCKS_PER_FRAME:], work)
