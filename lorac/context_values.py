"""Values of context variables that only the code inside a call reads."""

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import TypeVar

T = TypeVar("T")
V = TypeVar("V")


def run_with_value(variable: ContextVar[V], value: V, work: Callable[[], T]) -> T:
    """Run some work with another value of a context variable, and return the work's result.

    An interrupt may prevent a ``with`` block from restoring the variable, but not the interpreter's ``Context.run``.
    """
    context = copy_context()
    context.run(variable.set, value)
    return context.run(work)
