"""Errors of the operating system as lorac's: missing files, permissions, full disks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from lorac.errors import LoracError


@contextlib.contextmanager
def translate_os_errors(
    path: str | os.PathLike[str], kind: type[LoracError], what: str, code: str | None = None
) -> Iterator[None]:
    """Turn an ``OSError`` inside the block into one of lorac's errors, with the path and the system's reason.

    Args:
        path: the file that is read or written, for errors that name none.
        kind: the error to raise, with `code`.
        what: "read" or "written".
    """
    try:
        yield
    except OSError as error:
        named = error.filename if isinstance(error.filename, str) else os.fspath(path)
        raise kind(
            f"'{named}' cannot be {what}: {error.strerror or error}",
            next_step="check that it exists, is of the kind that is expected, and what its permissions allow",
            code=code,
        ) from error
