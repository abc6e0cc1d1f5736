"""The tree of cached prompts finds the entry that a scan of all entries finds."""

from __future__ import annotations

import gc
import random
from typing import Any

import pytest
import torch

from lorac import PromptCache
from lorac.runtime.generation.prompt_cache import CacheKey


class Engine:
    memory_budget = None


class Cache:
    """Stands for keys and values; a copy says of which rows and lengths it is."""

    charge = None
    is_croppable = True

    def __init__(self, rows: list[torch.Tensor]) -> None:
        self.rows, self.nbytes = rows, sum(map(len, rows))

    def copy(self, rows: list[int]) -> Any:
        return Cache([self.rows[row] for row in rows])

    def set_encoder_outputs(self, outputs: dict[str, torch.Tensor]) -> None:
        assert not outputs

    def crop(self, lengths: list[int]) -> None:
        self.rows = [row[:length] for row, length in zip(self.rows, lengths, strict=True)]


def shared(one: torch.Tensor, other: torch.Tensor) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def scan(cache: PromptCache, engine: Any, key: CacheKey, rows: list[torch.Tensor]) -> int:
    """Return how many tokens of rows, each without its last, the best of all entries shares."""
    entries = [entry for entry in cache._entries if entry.engine() is engine and entry.key == key]
    return max((sum(max(shared(own, row[:-1]) for own in e.rows) for row in rows) for e in entries), default=0)


def begins(rows: Any, others: Any) -> bool:
    return all(any(shared(row, other) == len(row) for other in others) for row in rows)


@pytest.mark.parametrize("seed", range(6))
def test_finds_the_longest_shared_beginnings_that_a_scan_finds(seed: int) -> None:
    draw, engines = random.Random(seed), [Engine(), Engine()]
    cache: Any = PromptCache(bytes=120)

    def rows() -> list[torch.Tensor]:
        return [torch.tensor(draw.choices((0, 1), k=draw.randrange(1, 12))) for _ in range(draw.choice((1, 1, 2, 3)))]

    for _ in range(300):
        engine, key = draw.choice(engines), (draw.choice("gh"), (draw.choice("ab"),), draw.randrange(2))
        wanted, new = rows(), rows()
        expected, found = scan(cache, engine, key, wanted), cache.find(engine, key, wanted)
        assert expected == (0 if found is None else sum(map(len, found.rows)))
        if found is not None:
            assert all(torch.equal(row[: len(own)], own) for row, own in zip(wanted, found.rows, strict=True))
        before = [*cache._entries]
        cache.add(engine, key, new, Cache(new))
        alike = {e: e.engine() is engine and e.key[:2] == key[:2] for e in before}
        stay = [e for e in before if not alike[e] or (e.key == key and not begins(e.rows, new))]
        left = [*cache._entries]
        assert left == ([*stay, left[-1]] if left else [])[-len(left) :], "the least recently used go first"
        assert sum(entry.nbytes for entry in left) == cache.used <= cache.bytes
        assert len(left) == len(stay) + 1 or cache.used + stay[-len(left)].nbytes > cache.bytes
        if draw.random() < 0.1 and left:
            cache.drop(gone := draw.choice(left))
            assert gone not in cache._entries
    del engine, engines[0]
    gc.collect()
    cache.add(engines[0], key, new, Cache(new))
    assert {entry.engine() for entry in cache._entries} == {engines[0]}
    for entry in [*cache._entries]:
        cache.drop(entry)
    assert (len(cache), cache.used, cache._trees) == (0, 0, {})


def test_empty_sequences_replace_each_other() -> None:
    cache: Any = PromptCache(bytes=120)
    engine: Any = Engine()
    for _ in range(3):
        cache.add(engine, ("g", (), 0), [torch.tensor([], dtype=torch.int64)], Cache([]))
    assert len(cache) == 1


def test_an_interrupt_leaves_a_cache_that_works(monkeypatch: pytest.MonkeyPatch) -> None:
    cache: Any = PromptCache()
    engine: Any = Engine()
    rows = [torch.arange(5)]
    cache.add(engine, ("g", (), 0), rows, Cache(rows))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("lorac.runtime.generation.prompt_cache._common_prefix_length", _interrupt)
        cache.add(engine, ("g", (), 0), [torch.arange(9)], Cache(rows))
    assert (len(cache), cache.used) == (0, 0)
    cache.add(engine, ("g", (), 0), rows, Cache(rows))
    assert cache.find(engine, ("g", (), 0), rows) is not None


def _interrupt(one: torch.Tensor, other: torch.Tensor) -> int:
    raise KeyboardInterrupt
