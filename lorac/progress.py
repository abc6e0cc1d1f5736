"""Progress bars on a terminal for work that takes longer than two seconds.

``progress`` opens a block, and code inside names its steps with ``step``. A nested block shows its steps in the outer
block's bar.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.progress

DELAY_SECONDS = 2.0
"""Time before a bar appears."""


class Progress:
    """A report of the named steps of some work; a bar shows it once the work has taken ``DELAY_SECONDS``.

    Args:
        title: name of the work.
        total: number of steps; None if unknown.
        outer: the enclosing block, which then shows the steps.
    """

    def __init__(self, title: str, total: int | None = None, outer: Progress | None = None) -> None:
        self.title, self.total, self._outer = title, total, outer
        self._done, self._step = 0, ""
        self._lock = threading.Lock()
        self._bar: rich.progress.Progress | None = None
        self._task: rich.progress.TaskID | None = None

    def step(self, name: str) -> None:
        """Begin the next step."""
        if self._outer is not None:
            self._outer.step(f"{self.title}, {name}")
            return
        with self._lock:
            self._done += bool(self._step)
            self._step = name
            self._refresh()

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with self._lock:
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.title, total=self.total)
            self._bar.start()
            self._refresh()

    def _refresh(self) -> None:
        if self._bar is not None and self._task is not None:
            text = f"{self.title}: {self._step}" if self._step else self.title
            self._bar.update(self._task, completed=self._done, description=text)


_current: ContextVar[Progress | None] = ContextVar("progress", default=None)


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Progress]:
    """Report the steps of a block; prints nothing if standard error is not a terminal."""
    outer = _current.get()
    if outer is not None:
        yield Progress(title, outer=outer)
        return
    report = Progress(title, total)
    timer = threading.Timer(DELAY_SECONDS, report._show)
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    entered = _current.set(report)
    try:
        yield report
    finally:
        _current.reset(entered)
        timer.cancel()
        with report._lock:
            if report._bar is not None:
                report._bar.stop()


def step(name: str) -> None:
    """Begin the next step of the current block, if there is one."""
    report = _current.get()
    if report is not None:
        report.step(name)
