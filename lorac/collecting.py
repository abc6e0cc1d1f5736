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
    global _resting  # noqa: PLW0603  (of the process, as the collector is)
    with _LOCK:
        if _resting or gc.isenabled():
            _resting += 1
        counted = _resting > 0
        gc.disable()
    try:
        yield
    finally:
        with _LOCK:
            _resting -= counted
            if counted and not _resting:
                gc.enable()
