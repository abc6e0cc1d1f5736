"""Errors cross processes whole."""

from __future__ import annotations

import pickle

import pytest

import lorac


@pytest.mark.parametrize(
    "error",
    [lorac.OverBudget("3 wait", nearest="2", next_step="wait", code="queue_full"), lorac.MissingExtra("ray", "ray")],
)
def test_a_copy_is_the_error(error: lorac.LoracError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error) and str(copy) == str(error) and vars(copy) == vars(error)
