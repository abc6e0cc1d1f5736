"""A warning of lorac's points at the caller's own line."""

from __future__ import annotations

import inspect

import pytest

import lorac
from lorac.errors import warn


def test_warnings_point_at_the_first_line_outside_lorac() -> None:
    through = {"__name__": "lorac.somewhere", "warn": warn}
    exec("def call():\n    warn('what', next_step='do this')", through)
    with pytest.warns(lorac.LoracWarning, match="what\n  do this") as caught:
        through["call"]()
    frame = inspect.currentframe()
    assert frame is not None
    assert [found.filename for found in caught] == [__file__]
    assert caught[0].lineno == frame.f_lineno - 4
