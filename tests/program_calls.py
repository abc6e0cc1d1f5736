"""Notes the calls of bound programs."""

from collections.abc import Callable
from typing import Any

import pytest

from lorac.target.engine import BoundProgram


def note_calls(monkeypatch: pytest.MonkeyPatch, program: BoundProgram, method: str, note: Callable[..., Any]) -> None:
    """Call ``note`` with the arguments of a method before any program of a class runs it.

    Args:
        program: one of the class.
    """
    cls = type(program)
    original = getattr(cls, method)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note(*args[1:], **kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(cls, method, noted)
