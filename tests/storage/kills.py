"""Processes that are killed at a step of their work."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any


def killed_at(moment: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator: the ``moment``-th call of all that it decorates kills the process before its work."""
    done = 0

    def dying(change: Callable[..., Any]) -> Callable[..., Any]:
        def step(*given: Any, **named: Any) -> Any:
            nonlocal done
            done += 1
            if done == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return change(*given, **named)

        return step

    return dying
