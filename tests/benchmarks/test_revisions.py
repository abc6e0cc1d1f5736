"""The verdict of the benchmark that compares two revisions."""

from __future__ import annotations

from argparse import Namespace

from benchmarks import revisions


def find(again: float, new: float, limit: float) -> list[str]:
    sides = dict(zip(revisions.SIDES, (1.0, again, new), strict=True))
    found = {(side,): dict.fromkeys(revisions.FIGURES, 1.0) | {"swap": seconds} for side, seconds in sides.items()}
    return revisions.find_slower(found, Namespace(old="v1", limit=limit))


def test_names_a_figure_beyond_limit_and_noise() -> None:
    (sentence,) = find(again=1.02, new=1.3, limit=1.1)
    assert sentence == "a swap and the next call takes 1.30 times as long as at v1, where at most 1.1 is admitted"


def test_admits_noise_small_changes_and_no_limit() -> None:
    assert find(again=1.2, new=1.3, limit=1.1) == find(again=0.83, new=1.3, limit=1.1) == []
    assert find(again=1.0, new=1.09, limit=1.1) == find(again=1.0, new=2.0, limit=0.0) == []
