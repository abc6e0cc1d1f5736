"""Python's garbage collector while a model is compiled: it rests.

A graph is millions of small objects that all live until it is emitted. Whenever there are a quarter more of them the
collector looks through everything in the process for cycles that nothing reaches any more, libraries and models too,
and finds none worth the time.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_resting = 0


@contextmanager
def uncollected() -> Iterator[None]:
    """Nothing is collected inside the block, by the collector's own choice; asked for, it collects.

    The collector belongs to the process: it rests for as long as any thread is inside such a block. One that somebody
    has switched off stays off.
    """
    counted = _rest()
    try:
        yield
    finally:
        _end_rest(counted)


def _rest() -> bool:
    """Have the collector rest; say whether it would run otherwise, now or once others let it."""
    global _resting  # noqa: PLW0603  (of the process, as the collector is)
    with _LOCK:
        counted = _resting > 0 or gc.isenabled()
        _resting += counted
        gc.disable()
    return counted


def _end_rest(counted: bool) -> None:
    global _resting  # noqa: PLW0603  (of the process)
    with _LOCK:
        _resting -= counted
        if counted and not _resting:
            gc.enable()
