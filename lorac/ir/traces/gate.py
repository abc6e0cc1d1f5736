"""One gate for tracing of any kind: torch's tracers are not safe across threads.

``torch.export``, ``make_fx``, decompositions and fake modes set variables of the whole process while they run, as do
transformers' exporters. Two threads that trace at once read each other's.
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
    """Say that torch.compile traces a call of a compiled model in the block, as it runs."""
    token = _whole_call.set(True)
    try:
        yield
    finally:
        _whole_call.reset(token)


def is_whole_call_traced() -> bool:
    """Return whether torch.compile traces a call of a compiled model as it runs."""
    return _whole_call.get()


def outside_traces() -> AbstractContextManager[object]:
    """Return a block that computes at once, also where an exporter or torch.compile traces the code around it."""
    return _disable_current_modes() if torch.compiler.is_exporting() or is_whole_call_traced() else nullcontext()


@contextmanager
def tracing() -> Iterator[None]:
    """Trace inside the block while no other thread of lorac's traces; blocks of one thread may be nested."""
    with _GATE:
        yield


def can_hook_saved_tensors() -> bool:
    """Return whether autograd takes hooks on tensors that it saves: not in torch.func's transforms, nor in traces."""
    refused = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    return refused is None and not (torch.compiler.is_compiling() or is_whole_call_traced())
