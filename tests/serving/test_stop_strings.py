"""Strings that end an answer."""

from __future__ import annotations

import random
import time

import pytest

from lorac.serving.answers.answers import StopString


@pytest.mark.parametrize("seed", range(4))
def test_finds_a_string_in_text_that_comes_in_parts(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(200):
        text = "".join(draw.choices("ab", k=draw.randrange(30)))
        stop = "".join(draw.choices("ab", k=draw.randrange(1, 7)))
        search, read = StopString(stop), ""
        while read != text:
            part = text[len(read) :][: draw.randrange(1, 5)]
            end = search.find(part)
            read += part
            begun = max(n for n in range(len(stop) + 1) if read.endswith(stop[:n]))
            if stop in read:
                assert end is not None and len(read) - len(part) + end == read.index(stop) + len(stop)
                break
            assert (end, search.begun) == (None, begun)


def test_a_step_takes_the_time_of_its_text_however_long_the_string() -> None:
    search = StopString("u" * 100_000 + "v")
    search.find("u" * 99_999)
    begun = time.thread_time()
    assert search.find("u" * 1000) is None
    assert time.thread_time() - begun < 0.05
