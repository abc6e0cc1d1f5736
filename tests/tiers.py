"""Tiers of tests: ``@pytest.mark.medium(reason)`` and ``@pytest.mark.slow(reason)``.

The reason names the tests that find the same fault sooner; a test that is long by nature gives none. A marker may take
some cases of a parametrised test only: those that match a pattern of ``cases``, or all but those that match a pattern
of ``keep``. In a pattern, * stands for any characters.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Generator, Sequence

import pytest

TIERS = ("medium", "slow")


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makeitem(collector: pytest.Collector) -> Generator[None, object, object]:
    """Remove a tier's marker from the cases that it leaves; fail for a pattern that matches no case."""
    made = yield
    if isinstance(made, list) and made and isinstance(made[0], pytest.Function):
        for mark in [mark for mark in made[0].own_markers if mark.name in TIERS and mark.kwargs]:
            _remove_from_cases(mark, made, collector)
    return made


def _remove_from_cases(mark: pytest.Mark, tests: Sequence[pytest.Function], collector: pytest.Collector) -> None:
    [(kind, patterns)] = mark.kwargs.items()
    cases = [test.callspec.id if hasattr(test, "callspec") else "" for test in tests]
    if stale := [pattern for pattern in patterns if not any(_matches(case, pattern) for case in cases)]:
        raise collector.CollectError(f"{tests[0].originalname}: no case matches {stale} of its marker {mark.name!r}")
    for test, case in zip(tests, cases, strict=True):
        if any(_matches(case, pattern) for pattern in patterns) == (kind == "keep"):
            test.own_markers.remove(mark)


def _matches(case: str, pattern: str) -> bool:
    """Return whether a case's id matches a pattern, in which * alone stands for other characters."""
    return fnmatch.fnmatchcase(case.replace("[", "<"), pattern.replace("[", "<"))
