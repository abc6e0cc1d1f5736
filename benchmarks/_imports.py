"""Processor time that goes into importing modules, told apart from what is measured.

Some libraries import all they need at their top, before a clock starts; others, lorac among them, when they first need
it. To measure work beyond imports on both alike, the time of imports inside what is measured is counted by itself.
"""

from __future__ import annotations

import builtins
import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

Clock = Callable[[], float]


class Imports:
    """Counts the time of imports: of the outermost, and of those only that load a module.

    An import is a statement (``builtins.__import__``) or a call of ``importlib.import_module``. A module that is loaded
    in yet another way counts as work.

    Args:
        clock: seconds.

    Attributes:
        seconds: spent so far.
    """

    def __init__(self, clock: Clock) -> None:
        self.seconds = 0.0
        self._clock, self._within = clock, False

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count inside the block."""
        with contextlib.ExitStack() as stack:
            for owner, name in ((builtins, "__import__"), (importlib, "import_module")):
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name))))
            yield

    def _timed(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            if self._within:
                return load(*args, **options)
            known, begun, self._within = len(sys.modules), self._clock(), True
            try:
                return load(*args, **options)
            finally:
                self._within = False
                if len(sys.modules) > known:
                    self.seconds += self._clock() - begun

        return timed
