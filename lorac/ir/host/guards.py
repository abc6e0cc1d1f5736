"""Lines of a model that a trace stumbles over, or that fix a size: what torch raises, and what it logs meanwhile.

Tracing runs the model's own Python, so its frames are in every traceback. Of what the model asks about sizes torch
keeps the answers alone, but it logs each while the line runs that asks.
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from lorac.lines import innermost_line, is_elsewhere, line_of

_LOGGER = "torch.fx.experimental.symbolic_shapes"
_ADDED = re.compile(r"(\S.*) \[guard added\]")
_ENTERED = "_call_impl"
"""Of torch, what calls a module's forward: whatever is further out is no line of the model."""


@dataclass(frozen=True)
class Guard:
    """What a trace takes for granted from some line on.

    Attributes:
        condition: as torch writes it, ``Eq(s27, 7)`` for one.
        line: ``file:line: code`` of the innermost line of the model that asked.
    """

    condition: str
    line: str


@contextmanager
def listening(found: list[Guard]) -> Iterator[None]:
    """The guards that traces inside the block add, as they come."""
    logger, handler = logging.getLogger(_LOGGER), _Listener(found)
    before = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)


class _Listener(logging.Handler):
    def __init__(self, found: list[Guard]) -> None:
        super().__init__()
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        added = _ADDED.search(record.getMessage())
        line = line_that_runs() if added else None
        if added and line:
            self._found.append(Guard(added[1].removeprefix("eval "), line))


def line_that_runs() -> str | None:
    """The innermost line of a model that is running."""
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        if found is None and is_elsewhere(frame.f_code.co_filename):
            found = frame
        if found is not None and frame.f_code.co_name == _ENTERED:
            return line_of(found)
        frame = frame.f_back
    return None


def fixing(guards: Sequence[Guard], symbol: str) -> str | None:
    """The line that fixed a size, by torch's symbol for it."""
    named = re.compile(rf"\b{re.escape(symbol)}\b")
    equal = [guard for guard in guards if guard.condition.startswith("Eq(") and named.search(guard.condition)]
    alone = [guard for guard in equal if guard.condition.startswith(f"Eq({symbol}, ")]
    return next((guard.line for guard in (*alone, *equal)), None)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def source_line(error: BaseException) -> str | None:
    """``file:line: code`` of the innermost line of the model in an error of torch.export; None where there is none."""
    for e in chain(error):
        frames = traceback.extract_tb(e.__traceback__)
        entered = next((i for i, frame in enumerate(frames) if frame.name == _ENTERED), len(frames))
        if line := innermost_line(frames[entered:]):
            return line
    return None
