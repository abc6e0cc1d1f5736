"""One lock for tracing of any kind: torch's tracers are not thread-safe.

``torch.export``, ``make_fx``, decompositions, fake modes and transformers' exporters set process-wide variables while
they run. Two threads that trace at once read each other's variables.
"""

import contextvars
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import _disable_current_modes

_GATE = threading.RLock()
_whole_call: contextvars.ContextVar[bool] = contextvars.ContextVar("whole_call", default=False)


@contextmanager
def tracing_whole_call() -> Iterator[None]:
    """Mark, inside the block, that torch.compile traces a whole call of a compiled model."""
    token = _whole_call.set(True)
    try:
        yield
    finally:
        _whole_call.reset(token)


def is_whole_call_traced() -> bool:
    """Return whether torch.compile traces a whole call of a compiled model."""
    return _whole_call.get()


def outside_traces() -> AbstractContextManager[object]:
    """Return a context in which ops compute at once, even where an exporter or torch.compile traces the caller."""
    return _disable_current_modes() if torch.compiler.is_exporting() or is_whole_call_traced() else nullcontext()


@contextmanager
def tracing() -> Iterator[None]:
    """Hold lorac's tracing lock inside the block, so that no other thread traces; one thread may nest blocks."""
    with _GATE:
        yield


def can_hook_saved_tensors() -> bool:
    """Return whether autograd accepts hooks on saved tensors: not in torch.func's transforms or in traces."""
    refused = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    return refused is None and not (torch.compiler.is_compiling() or is_whole_call_traced())
