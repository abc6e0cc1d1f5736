"""Values that the code inside a call reads, and no other code."""

from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import TypeVar

T = TypeVar("T")
V = TypeVar("V")


def run_with_value(variable: ContextVar[V], value: V, work: Callable[[], T]) -> T:
    """Run some work while a variable has another value, and return its result.

    An interrupt may keep a ``with`` block from setting the variable back, but not the interpreter's ``Context.run``.
    """
    context = copy_context()
    context.run(variable.set, value)
    return context.run(work)
