"""Refusals by the code of their error."""

import pytest

import lorac


def refuses(code, **rest):
    """Expect a ``LoracError`` with a code; further arguments are those of ``pytest.raises``."""
    return pytest.raises(lorac.LoracError, check=lambda error: error.code == code, **rest)
