"""Whoever is killed while writing leaves the old or the new, whole; and nothing else once the next one has written."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from lorac import LoracError
from tests.storage.writers import FOREIGN, KINDS, read, reset, start, write, write_on, write_until

WAYS = [(kind, exchange) for kind in KINDS for exchange in (True, False) if exchange or kind != "native"]
IDS = [f"{kind}-{'exchanged' if exchange else 'renamed'}" for kind, exchange in WAYS]


def _put_foreign(kind: str, target: Path) -> None:
    for name, text in FOREIGN.items() if kind == "peft" else ():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(text)


def _assert_foreign(kind: str, target: Path) -> None:
    for name, text in FOREIGN.items() if kind == "peft" else ():
        assert (target / name).read_text() == text


@pytest.mark.medium("a file exchanged, and an artifact killed at any time", cases=["artifact-renamed"])
@pytest.mark.slow(
    "an artifact renamed and a file exchanged; make kill does all", keep=["artifact-renamed", "native-exchanged"]
)
@pytest.mark.parametrize(("kind", "exchange"), WAYS, ids=IDS)
def test_a_writer_killed_at_any_step_leaves_the_old_or_new_version(kind: str, exchange: bool, tmp_path: Path) -> None:
    target = tmp_path / "it"
    write(kind, target, 1)
    _put_foreign(kind, target)
    seen, moment, ended = set(), 0, 9
    while ended:
        moment += 1
        before = read(kind, target)
        assert before is not None
        process = start(write_until, kind, target, moment + 1, exchange, moment)
        process.join(60)
        ended = process.exitcode or 0
        assert ended in (0, 9)
        assert target.exists() or not exchange
        found = read(kind, target)
        assert found in (before, moment + 1)
        seen.add(found == before)
        _assert_foreign(kind, target)
    assert seen == {True, False}
    assert moment > 3
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.medium("an artifact, and a file over an older one", keep=["artifact"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_writer_killed_at_any_step_of_a_first_write_leaves_all_or_nothing(kind: str, tmp_path: Path) -> None:
    target, moment, ended, seen = tmp_path / "it", 0, 9, set()
    while ended:
        moment += 1
        process = start(write_until, kind, target, 7, True, moment)
        process.join(60)
        ended = process.exitcode or 0
        assert ended in (0, 9)
        seen.add(read(kind, target))
        if ended:
            reset(target)
    assert seen == {None, 7}
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.medium("two other formats", cases=["peft"])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_time(kind: str, tmp_path: Path) -> None:
    target, chance = tmp_path / "it", random.Random(0)
    write(kind, target, 1)
    _put_foreign(kind, target)
    found = 1
    for _ in range(6):
        process = start(write_on, kind, target, found + 1, 1)
        while (now := read(kind, target)) == found:
            assert process.is_alive()
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.join(60)
        found = read(kind, target)
        assert found is not None
        assert now is not None
        assert found >= now
        _assert_foreign(kind, target)
    write(kind, target, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]


@pytest.mark.medium("writers that are killed at every step")
@pytest.mark.slow("a folder that is exchanged", keep=["peft-exchanged"])
@pytest.mark.parametrize(("kind", "exchange"), WAYS, ids=IDS)
def test_readers_never_see_a_mixture_of_two_writers(kind: str, exchange: bool, tmp_path: Path) -> None:
    target = tmp_path / "it"
    write(kind, target, 1)
    _put_foreign(kind, target)
    writers = [start(write_on, kind, target, first, 2, exchange) for first in (2, 3)]
    found: list[int | None] = []
    try:
        begun, last = time.monotonic(), 60.0
        while time.monotonic() < begun + (1.0 if len(set(found)) >= 5 else last):
            assert all(process.is_alive() for process in writers)
            try:
                found.append(read(kind, target))
            except LoracError as error:  # it came too late every time, and says so
                assert str(target) in str(error)
    finally:
        for process in writers:
            process.kill()
            process.join(60)
    assert None not in found or not exchange  # between renames there is nothing for a moment
    assert len(set(found)) >= 5, "the reader hardly ever met a version"
    write(kind, target, 1)
    _assert_foreign(kind, target)
    assert [path.name for path in tmp_path.iterdir()] == ["it"]
