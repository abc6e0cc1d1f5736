"""Lines of somebody else's code that stand in a traceback: what an error about a model or a formula names.

Frames of Python's own library, of torch and of lorac are passed over; lorac's methods, and the models of its
conformance kit, count as somebody's, since errors are about them.
"""

from __future__ import annotations

import inspect
import linecache
import os
import re
import sysconfig
from collections.abc import Callable, Sequence
from traceback import FrameSummary
from types import FrameType
from typing import Any

_FOLDERS = re.compile(r".*[/\\]")
_LIBRARIES = ("/torch/", "/transformers/exporters/", "<string>", "<frozen")
_STDLIB = sysconfig.get_paths()["stdlib"]
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_REPORTED_ROOMS = tuple(os.path.join(_PACKAGE, room) for room in ("variants", "testing"))


def innermost_user_line(frames: Sequence[FrameSummary]) -> str | None:
    """``file:line: code`` of the innermost frame that is somebody else's; None where none is."""
    found = next((frame for frame in reversed(frames) if is_user_code(frame.filename)), None)
    return None if found is None else f"{found.filename}:{found.lineno}: {found.line}"


def format_frame(frame: FrameType) -> str:
    """``file:line: code`` of a frame that runs."""
    filename = frame.f_code.co_filename
    return f"{filename}:{frame.f_lineno}: {linecache.getline(filename, frame.f_lineno).strip()}"


def is_user_code(filename: str) -> bool:
    """Whether a file is neither Python's, torch's nor lorac's machinery."""
    if filename.startswith(_STDLIB) and "site-packages" not in filename:
        return False
    if filename.startswith(_PACKAGE + os.sep) and not filename.startswith(_REPORTED_ROOMS):
        return False
    path = filename.replace(os.sep, "/")
    return not any(part in path for part in _LIBRARIES)


def format_location(filename: str, number: str) -> str:
    """``file.py:12``, without the folders."""
    return f"{_FOLDERS.sub('', filename)}:{number}"


def definition_line(function: Callable[..., Any]) -> str | None:
    """``file:line: code`` of where a function is defined; None where that is not Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return None
    first: int = code.co_firstlineno
    return f"{code.co_filename}:{first}: {linecache.getline(code.co_filename, first).strip()}"
