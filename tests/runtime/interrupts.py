"""Interrupts at every line that a piece of work runs through, one per run."""

from __future__ import annotations

import contextlib
import itertools
import linecache
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from lorac.adapters import pool
from lorac.runtime import choice_switch
from lorac.session import compiled

_INTERRUPTED = (choice_switch.__file__.rpartition("/")[0], compiled.__file__, pool.__file__)
_PYTHONS = (contextlib.__file__, threading.__file__)
"""Modules of Python's own whose lines hold locks for the runtime."""


class Interrupted(BaseException):
    """The exception that is raised between two lines, like KeyboardInterrupt."""


def interrupted(work: Callable[[], object], stride: int = 1, where: tuple[str, ...] = _INTERRUPTED) -> Iterator[None]:
    """Run a piece of work, interrupted before its first line, and ``stride`` lines later each time, until it ends.

    Yields after each run. Only code in files whose paths begin so is interrupted, and what Python runs for it.
    """
    for moment in itertools.count(1, stride):
        ended = _run(work, moment, where)
        yield
        if ended:
            return


def _is_ours(frame: FrameType | None, where: tuple[str, ...]) -> bool:
    file = "" if frame is None else frame.f_code.co_filename
    return file.startswith(where) or (file in _PYTHONS and frame is not None and _is_ours(frame.f_back, where))


def _line(frame: FrameType) -> str:
    """Return the next line.

    A tracer may raise where a ``with`` is left, before it releases anything, and at a ``try`` inside it, which has no
    instruction of its own. Signals are not handled there.
    """
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


def _run(work: Callable[[], object], moment: int, where: tuple[str, ...]) -> bool:
    left = moment

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if not _is_ours(frame, where):
            return None
        if event == "line" and not _line(frame).startswith(("with ", "try:")):
            left -= 1
            if left == 0:
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except Interrupted:
        return False
    finally:
        sys.settrace(before)
    return True
