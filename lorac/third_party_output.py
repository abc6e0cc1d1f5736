"""Silence of the libraries that lorac drives, asked of them: by the levels of their loggers and a filter of warnings.

What they say while a model is captured and emitted is about their own deprecations, their steps and the versions they
were tested with, and is not the user's to act on. What goes wrong is raised, and told by lorac's own errors; what a
model itself warns of, it says where it is called.
"""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

SUPPRESSED_LOGGERS = ("torch", "transformers", "onnxscript", "onnx_ir")
"""Whose messages are held back; a logger below them with a level of its own (``TORCH_LOGS`` gives one) still speaks."""
_HELD = logging.CRITICAL


class _Silence:
    """Silence of the whole process, for as long as any thread asks for it.

    Levels and filters belong to the process. Were each block to put back what it found, two threads whose blocks
    overlap would leave the silence of the one behind for good.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._levels: dict[str, int] = {}
        self._warnings = warnings.catch_warnings()

    def begin(self) -> None:
        """One more block asks for silence."""
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._warnings = warnings.catch_warnings(action="ignore")
                self._warnings.__enter__()
            # A library that was imported inside an outer block has set its own level since.
            for logger in [known for known in map(logging.getLogger, SUPPRESSED_LOGGERS) if known.level != _HELD]:
                self._levels[logger.name] = logger.level
                logger.setLevel(_HELD)

    def end(self) -> None:
        """One block less; the last puts everything back."""
        with self._lock:
            self._blocks -= 1
            if self._blocks:
                return
            self._warnings.__exit__(None, None, None)
            # A level that was set inside the block is somebody's wish.
            for name in [name for name in self._levels if logging.getLogger(name).level == _HELD]:
                logging.getLogger(name).setLevel(self._levels[name])
            self._levels.clear()


_SILENCE = _Silence()


@contextmanager
def suppress_third_party_output() -> Iterator[None]:
    """Nothing that torch, transformers or the ONNX libraries log or warn of inside the block is seen."""
    _SILENCE.begin()
    try:
        yield
    finally:
        _SILENCE.end()


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """transformers draws no bars of its own, while it reads and writes models, inside the block."""
    from transformers.utils import logging as bars

    drawn = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            bars.enable_progress_bar()
