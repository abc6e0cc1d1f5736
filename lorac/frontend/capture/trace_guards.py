"""The lines of a model that add guards to its trace or make the trace fail.

Tracing runs the model's Python code, so that its frames are in every traceback. torch keeps only the results of
comparisons of sizes, but it logs each guard while the line that causes it runs.
"""

import functools
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import ParamSpec, TypeVar

from torch import nn
from torch._guards import detect_fake_mode

from lorac.source_lines import format_frame, innermost_user_line, is_user_code

P = ParamSpec("P")
T = TypeVar("T")
_ADDED = re.compile(r"(\S.*) \[guard added\]")
_ENTERED = "_call_impl"
"""torch's function that calls a module's forward; frames outside it are not the model's."""


@dataclass(frozen=True)
class TraceGuard:
    """A condition that a trace assumes from one line of the model on.

    Attributes:
        condition: as torch writes it, such as ``Eq(s27, 7)``.
        line: ``file:line: code`` of the innermost line of the model that causes it.
        module: the module to which the line belongs, if there is one.
    """

    condition: str
    line: str
    module: nn.Module | None = None


_LONGEST_CONDITION = 1000
"""Most characters of a condition on sizes. Convolutional models stay below 200; longer conditions take minutes to
evaluate."""
_TOO_LONG = "too long"
"""Text for a condition of more than ``_LONGEST_CONDITION`` characters."""


class SizesTooComplex(Exception):
    """An error that ends a trace whose conditions on sizes grow too long to evaluate.

    Args:
        guard: the first such condition.
    """

    def __init__(self, guard: TraceGuard) -> None:
        super().__init__("it computes sizes from the free sizes that are too large to compute with")
        self.guard = guard


def record_guards(forward: Callable[P, T], found: list[TraceGuard], *, bounded: bool = False) -> Callable[P, T]:
    """Wrap a forward so that its trace records the guards that it adds.

    With ``bounded`` it raises ``SizesTooComplex`` for a condition longer than ``_LONGEST_CONDITION``.

    torch logs each guard while the line that causes it runs, through the logger of one trace's sizes; this logger is
    replaced by a private one, so that other traces are not recorded.
    """

    @functools.wraps(forward)
    def record(*args: P.args, **kwargs: P.kwargs) -> T:
        mode = detect_fake_mode([*args, *kwargs.values()])
        if mode is None or mode.shape_env is None:
            return forward(*args, **kwargs)
        shared, private = mode.shape_env.log, logging.Logger(__name__, logging.INFO)
        private.addHandler(_GuardHandler(found, bounded))
        mode.shape_env.log = private
        try:
            return forward(*args, **kwargs)
        finally:
            mode.shape_env.log = shared

    return record


class _GuardHandler(logging.Handler):
    def __init__(self, found: list[TraceGuard], bounded: bool) -> None:
        super().__init__()
        self._found, self._bounded = found, bounded

    def emit(self, record: logging.LogRecord) -> None:
        added = _ADDED.search(record.getMessage())
        line = find_running_model_line() if added else None
        if added and line:
            # A list of frames would contain its own frame, and keep the tensors of this trace alive.
            module = _find_module(frame for frame, _ in traceback.walk_stack(None))
            condition = added[1].removeprefix("eval ")
            if self._bounded and len(condition) > _LONGEST_CONDITION:
                raise SizesTooComplex(TraceGuard(_TOO_LONG, line, module))
            self._found.append(TraceGuard(condition, line, module))


def find_running_model_line() -> str | None:
    """Return the innermost running line of a model, or None."""
    frame: FrameType | None = sys._getframe(1)
    found = None
    while frame is not None:
        if found is None and is_user_code(frame.f_code.co_filename):
            found = frame
        if found is not None and frame.f_code.co_name == _ENTERED:
            return format_frame(found)
        frame = frame.f_back
    return None


def _find_module(frames: Iterable[FrameType]) -> nn.Module | None:
    """Return the module to which the innermost method of a model belongs, given the innermost frame first."""
    owners = (frame.f_locals.get("self") for frame in frames if is_user_code(frame.f_code.co_filename))
    return next((owner for owner in owners if isinstance(owner, nn.Module)), None)


def find_failing_module(error: BaseException) -> nn.Module | None:
    """Return the innermost module of the model in an error of torch.export, or None."""
    for e in iter_error_causes(error):
        frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
        if (module := _find_module(reversed(frames))) is not None:
            return module
    return None


def find_fixing_line(guards: Sequence[TraceGuard], symbol: str) -> str | None:
    """Return the line that fixed a size, given torch's symbol for it; None if unknown."""
    pattern = re.compile(rf"\b{re.escape(symbol)}\b")
    equal = [guard for guard in guards if guard.condition.startswith("Eq(") and pattern.search(guard.condition)]
    exact = [guard for guard in equal if guard.condition.startswith(f"Eq({symbol}, ")]
    too_long = [guard for guard in guards if guard.condition == _TOO_LONG]
    return next((guard.line for guard in (*exact, *equal, *too_long)), None)


def iter_error_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def find_failing_model_line(error: BaseException) -> str | None:
    """Return ``file:line: code`` of the innermost line of the model in an error of torch.export, or None."""
    for e in iter_error_causes(error):
        frames = traceback.extract_tb(e.__traceback__)
        entered = next((i for i, frame in enumerate(frames) if frame.name == _ENTERED), len(frames))
        if line := innermost_user_line(frames[entered:]):
            return line
    return None
