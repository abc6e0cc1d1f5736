"""Errors that many formats raise."""

from __future__ import annotations

from lorac.errors import FormatError


def unsupported_error(what: str, *, next_step: str | None, nearest: str | None = None) -> FormatError:
    """Return the error for a value that lorac does not build, or that a format has no place for."""
    return FormatError(what, nearest=nearest, next_step=next_step, code="unsupported_field")


def corrupt_error(what: str, *, nearest: str | None = None, next_step: str | None = None) -> FormatError:
    """Return the error for a file that is damaged or incomplete; its usual next step is to copy the file again."""
    return FormatError(what, nearest=nearest, next_step=next_step, code="corrupt_file")
