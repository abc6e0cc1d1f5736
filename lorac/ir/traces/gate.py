"""One gate for tracing of any kind: torch's tracers are not safe across threads.

``torch.export``, ``make_fx``, decompositions and fake modes set variables of the whole process while they run, as do
transformers' exporters. Two threads that trace at once read each other's.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_GATE = threading.RLock()


@contextmanager
def tracing() -> Iterator[None]:
    """Trace inside the block while no other thread of lorac's traces; blocks of one thread may be nested."""
    with _GATE:
        yield
