"""A lock for many readers or one writer: calls of a fused engine read its weights, and a swap writes them.

A thread that is interrupted at any line, by Ctrl-C or by an exception from a signal handler, releases all its locks.
For this each lock is an RLock of the interpreter, held by its own ``with``. A condition or a context manager written
in Python would not release safely, since an interrupt may come between its own lines.
"""

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TypeVar

from lorac.errors import Unavailable

T = TypeVar("T")
_LOCKS_PER_FRAME = 4


class ReadWriteLock:
    """A lock per reading thread, and a gate that a writer acquires before it acquires the locks of all readers.

    Writers go first: a waiting writer blocks new readers, so that a stream of calls does not starve a swap.
    """

    def __init__(self) -> None:
        self._gate = threading.RLock()
        self._local = threading.local()
        self._readers: tuple[weakref.ref[threading.RLock], ...] = ()
        """The locks of threads that have read; a lock is freed with its thread."""

    def reading(self) -> threading.RLock:
        """Return the lock that blocks writers while it is held; wait for a writer that writes or waits to write.

        A thread that reads or writes already does not wait: the writer may be waiting for that thread.
        """
        lock: threading.RLock | None = getattr(self._local, "lock", None)
        if lock is None:
            lock = threading.RLock()
            with self._gate:
                self._readers = (*(ref for ref in self._readers if ref() is not None), weakref.ref(lock))
                self._local.lock = lock
        if _is_owned(lock):
            return lock
        with self._gate:
            return lock

    def refuse_within(self) -> None:
        """Raise ``Unavailable`` where this thread is reading or writing: the weights must not change meanwhile."""
        lock: threading.RLock | None = getattr(self._local, "lock", None)
        if _is_owned(self._gate) or (lock is not None and _is_owned(lock)):
            raise Unavailable(
                "a running call of this thread uses the weights that would change",
                next_step="change adapters after the call, or at any time with mode='live'",
            )

    def writing(self, work: Callable[[], T]) -> T:
        """Block new readers, wait for running readers, and call ``work`` alone."""
        with self._gate:
            return _run_with_locks([lock for ref in self._readers if (lock := ref()) is not None], work)


def _is_owned(lock: threading.RLock) -> bool:
    """Return whether this thread holds a lock: ``Condition.notify`` raises where it does not."""
    try:
        threading.Condition(lock).notify(0)
    except RuntimeError:
        return False
    return True


def _run_with_locks(locks: Sequence[threading.RLock], work: Callable[[], T]) -> T:
    """Call ``work`` with all the locks held, a few in each frame of the stack."""
    if not locks:
        return work()
    first, *rest = locks[:_LOCKS_PER_FRAME]
    one, two, three = (*rest, first, first, first)[: _LOCKS_PER_FRAME - 1]
    with first, one, two, three:
        return _run_with_locks(locks[_LOCKS_PER_FRAME:], work)
