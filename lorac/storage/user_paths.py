"""Paths as people give them: ``~`` is their home, and what is no path of this machine is answered."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from lorac.argument_types import check_type
from lorac.errors import LoracError, short

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""The beginning of an address on the web, also if a Path has shortened its slashes; a drive has one letter."""
_STEP = "give the path of a file or folder"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def parse_path(given: object, subject: str, kind: type[LoracError], code: str | None = None) -> Path:
    """Return a path with ``~`` as the home folder.

    Args:
        given: the path.
        subject: the path as the subject of a sentence: "what lorac.load reads".
        kind: the error for text that is no path, with `code`.

    Raises:
        WrongType: it is neither text nor a path.
    """
    check_type(given, (str, os.PathLike), subject, next_step=_STEP)
    text = os.fspath(given)  # type: ignore[call-overload]  # checked above
    path = Path(text)
    if _ADDRESS.match(str(path)):
        raise kind(f"{subject} is an address, {short(text)}", next_step="download it, and give its path", code=code)
    try:
        os.lstat(path)
    except ValueError as error:  # a NUL, or a lone surrogate
        what = f"{subject} is {short(text)}, which no file can be called"
        raise kind(what, next_step=_STEP, code=code) from error
    except OSError:
        pass
    with contextlib.suppress(RuntimeError):  # there is no such user
        return path.expanduser()
    return path


def suggest_download(path: Path) -> str | None:
    """Return a next step for a missing path that has the form of a name on the Hugging Face hub."""
    name = path.as_posix()
    if not _HUB_NAME.fullmatch(name) or path.parent.exists():
        return None
    return f"if it is on the Hugging Face hub, huggingface_hub.snapshot_download('{name}') returns its folder"
