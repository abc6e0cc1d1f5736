"""Source lines of user code, for errors about a model or a formula.

Python's own library, torch and lorac are not user code. lorac's methods, and the models of its conformance kit, count
as user code since errors are about them.
"""

import inspect
import linecache
import os
import re
import sysconfig
from collections.abc import Callable, Sequence
from traceback import FrameSummary
from types import CodeType, FrameType

_FOLDERS = re.compile(r".*[/\\]")
_LIBRARIES = ("/torch/", "/transformers/exporters/", "<string>", "<frozen")
_STDLIB = sysconfig.get_paths()["stdlib"]
_PACKAGE = os.path.dirname(os.path.abspath(__file__))
_REPORTED_ROOMS = tuple(os.path.join(_PACKAGE, room) for room in ("variants", "testing"))


def innermost_user_line(frames: Sequence[FrameSummary]) -> str | None:
    """Return ``file:line: code`` of the innermost frame of user code, or None."""
    found = next((frame for frame in reversed(frames) if is_user_code(frame.filename)), None)
    return None if found is None else f"{found.filename}:{found.lineno}: {found.line}"


def format_frame(frame: FrameType) -> str:
    """Return ``file:line: code`` of a running frame."""
    return _format_code_line(frame.f_code, frame.f_lineno)


def is_user_code(filename: str) -> bool:
    """Return whether a file belongs neither to Python, nor to torch, nor to lorac's machinery."""
    if filename.startswith(_STDLIB) and "site-packages" not in filename:
        return False
    if filename.startswith(_PACKAGE + os.sep) and not filename.startswith(_REPORTED_ROOMS):
        return False
    path = filename.replace(os.sep, "/")
    return not any(part in path for part in _LIBRARIES)


def format_location(filename: str, number: str) -> str:
    """Return ``file.py:12``, without the folders."""
    return f"{_FOLDERS.sub('', filename)}:{number}"


def definition_line(function: Callable[..., object]) -> str | None:
    """Return ``file:line: code`` of a function's definition, or None for functions that are not Python."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return None if code is None else _format_code_line(code, code.co_firstlineno)


def _format_code_line(code: CodeType, number: int) -> str:
    return f"{code.co_filename}:{number}: {linecache.getline(code.co_filename, number).strip()}"
