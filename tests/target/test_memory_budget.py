"""Bytes are counted once for as long as anything holds them; a claim that does not fit leaves no trace."""

from __future__ import annotations

import functools
import random
import threading
import weakref
from typing import Any

import pytest
import torch

from lorac import OverBudget
from lorac.target import memory_budget
from lorac.target.memory_budget import Charge, MemoryBudget
from tests.refusing import refuses
from tests.runtime import interrupts

BLOCK = 4 * 64


class Holder:
    """Somebody who holds a thing."""

    def __init__(self, thing: tuple[Charge, list[torch.Tensor]]) -> None:
        self.thing = thing


class Shelf:
    """Things that are made when they are asked for, and kept while there is room."""

    def __init__(self, budget: MemoryBudget) -> None:
        self.budget, self.kept, self.made = budget, dict[int, tuple[Charge, list[torch.Tensor]]](), 0
        self.handed = dict[int, weakref.ref[Any]]()

    def take(self, key: int, size: int) -> Any:
        """Return a holder of the thing; it is in use for as long as the holder lives."""
        kept = self.kept.get(key)
        if kept is None:
            self.made += 1
            tensors = [torch.zeros(64 * size)]
            kept = self.budget.charge(tensors), tensors
        holder = self.handed[key]() if key in self.handed else None
        if holder is None:
            holder = Holder(kept)
            self.handed[key] = weakref.ref(holder)
        seen = self.handed[key]
        self.budget.keep(
            (id(self), key),
            kept[0],
            functools.partial(self.kept.__setitem__, key, kept),
            lambda: self.kept.pop(key, None),
            lambda: seen() is not None,
        )
        return holder


def test_memory_that_several_share_counts_once_and_until_the_last_is_gone() -> None:
    budget, tensor = MemoryBudget(), torch.zeros(64)
    one = budget.charge([tensor, tensor[:3]])
    two = budget.charge([tensor.view(8, 8), torch.zeros(64)])
    assert budget.used == 2 * BLOCK
    del one
    assert budget.used == 2 * BLOCK
    del two
    assert budget.used == 0


def test_evicts_the_least_recently_used_and_keeps_held_items() -> None:
    shelf = Shelf(MemoryBudget(4 * BLOCK))
    first = shelf.take(0, 1)
    for key in (1, 2, 3):
        shelf.take(key, 1)
    shelf.take(1, 1)
    shelf.take(4, 1)
    assert sorted(shelf.kept) == [0, 1, 3, 4]
    shelf.take(5, 3)
    assert sorted(shelf.kept) == [0, 5]
    assert first.thing is shelf.kept[0]
    assert shelf.budget.used == 4 * BLOCK


def test_rejects_a_claim_that_does_not_fit_and_evicts_nothing() -> None:
    shelf = Shelf(MemoryBudget(4 * BLOCK))
    held = [shelf.take(key, 1) for key in (0, 1)]
    shelf.take(2, 2)
    with refuses("over_budget", match="too small by 256"):
        shelf.take(3, 3)
    assert sorted(shelf.kept) == [0, 1, 2]
    with refuses("over_budget"):
        shelf.budget.limit = BLOCK
    assert (shelf.budget.limit, sorted(shelf.kept)) == (4 * BLOCK, [0, 1, 2])
    del held
    shelf.budget.limit = 0
    assert (shelf.kept, shelf.budget.used) == ({}, 0)


def test_resizes_a_claim_or_keeps_it() -> None:
    budget = MemoryBudget(100)
    claim = budget.claim(40)
    claim.resize(90)
    with refuses("over_budget"):
        budget.claim(11)
    with refuses("over_budget"):
        claim.resize(101)
    assert budget.used == 90
    claim.resize(10)
    assert budget.used == 10
    del claim
    assert budget.used == 0


def test_an_interrupt_leaves_nothing_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_INTERRUPTED", (memory_budget.__file__,))
    budget, tensor = MemoryBudget(10 * BLOCK), torch.zeros(BLOCK)
    stays = budget.charge([tensor])

    def work() -> None:
        claim = budget.claim(BLOCK)
        claim.resize(2 * BLOCK)
        claim.cover([tensor])
        del claim
        assert budget.used

    for _ in interrupts.interrupted(work):
        assert budget.used == tensor.nbytes
    del stays
    assert budget.used == 0


def test_an_interrupt_leaves_nothing_that_would_never_be_let_go_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupts, "_INTERRUPTED", (memory_budget.__file__,))
    shelf = Shelf(MemoryBudget())
    for _ in interrupts.interrupted(lambda: shelf.take(0, 1)):
        shelf.budget.limit = 0
        assert (shelf.kept, shelf.budget.used) == ({}, 0)
        shelf.budget.limit = None


@pytest.mark.parametrize("steps", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_random_operations_keep_to_the_limit_and_end_at_zero(steps: int) -> None:
    generator = random.Random(steps)
    budget = MemoryBudget(20 * BLOCK)
    shelf, held, claims, refused = Shelf(budget), list[Any](), list[Charge](), 0
    for _ in range(steps):
        before = sorted(shelf.kept)
        try:
            match generator.randrange(6):
                case 0 | 1:
                    key = generator.randrange(30)
                    held.append(shelf.take(key, key % 4 + 1))
                case 2:
                    key = generator.randrange(30)
                    shelf.take(key, key % 4 + 1)
                case 3 if held:
                    held.pop(generator.randrange(len(held)))
                case 4:
                    claims.append(budget.claim(BLOCK * generator.randrange(6)))
                case 5 if claims:
                    claims[-1].resize(BLOCK * generator.randrange(6))
                    claims.pop(generator.randrange(len(claims)))
        except Exception as error:
            assert type(error).__name__ == "OverBudget"
            assert sorted(shelf.kept) == before
            refused += 1
        counted = {block for kept, _ in (*shelf.kept.values(), *(one.thing for one in held)) for block in kept.blocks}
        assert budget.used == sum(block[1] for block in counted) + sum(claim.blocks[0][1] for claim in claims)
        assert budget.used <= 20 * BLOCK
    assert refused > steps / 100
    held.clear()
    claims.clear()
    budget.limit = 0
    assert (budget.used, shelf.kept) == (0, {})


def test_threads_share_a_budget() -> None:
    budget, lock, errors = MemoryBudget(30 * BLOCK), threading.Lock(), list[BaseException]()
    shelf = Shelf(budget)

    def work(seed: int) -> None:
        generator = random.Random(seed)
        try:
            for _ in range(500):
                claim = budget.claim(BLOCK * generator.randrange(4))
                with lock:
                    holder = shelf.take(generator.randrange(40), 1)
                assert budget.used <= 30 * BLOCK
                del claim, holder
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors[0]
    budget.limit = 0
    assert budget.used == 0


def test_rejects_for_good_a_claim_of_more_than_the_whole_budget() -> None:
    budget = MemoryBudget(10 * BLOCK)
    held = budget.claim(4 * BLOCK)
    for size, is_permanent in {7: False, 11: True}.items():
        with pytest.raises(OverBudget) as refused:
            budget.claim(size * BLOCK)
        assert refused.value.permanent is is_permanent
    with refuses("over_budget", match="at once"):
        held.resize(11 * BLOCK)
    assert budget.used == 4 * BLOCK
