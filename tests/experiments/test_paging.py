"""S-LoRA's pool, admission, prefetching and sharding by its equations, and both allocators over a trace."""

from __future__ import annotations

import random

import numpy as np
import pytest

from experiments._paging import (
    CellPool,
    PagedAllocator,
    PlacedAllocator,
    RowLoad,
    TracedRequest,
    adapter_cells,
    admits,
    cells_needed,
    pack_adapter,
    unpack_adapter,
)
from tests.refusing import refuses


def test_an_adapters_elements_lie_where_the_kernels_look() -> None:
    """With a hidden size of 8 and rank 2, B[5, 1] is at the flat position 11: cell 1, offset 3."""
    generator = np.random.default_rng(0)
    A, B = generator.normal(size=(2, 8)), generator.normal(size=(8, 2))
    keys, values = pack_adapter(A, B, 8)
    assert values.shape == (2, 8)
    assert values[1, 3] == B[5, 1]
    pool = CellPool(50)
    memory = np.zeros((2, 50, 8))
    pool.give_back(random.Random(0).sample(pool.take(50), 30))
    cells = list(pool.take(2))
    memory[0, cells], memory[1, cells] = keys, values
    for found, expected in zip(unpack_adapter(memory[0, cells], memory[1, cells]), (A, B), strict=True):
        assert np.array_equal(found, expected)


def test_cells_are_counted_and_given_out_once() -> None:
    pool = CellPool(10_000)
    adapters = [pool.take(adapter_cells(rank)) for rank in (8, 16)]
    assert pool.free == 9_904
    generator, held, free = random.Random(1), list[tuple[int, ...]](), pool.free
    for _ in range(10_000):
        if generator.random() < 0.5 and held:
            cells = held.pop(generator.randrange(len(held)))
            pool.give_back(cells)
            free += len(cells)
        else:
            count = generator.randrange(1, 400)
            try:
                held.append(pool.take(count))
                free -= count
            except Exception as error:
                assert type(error).__name__ == "OverBudget"
                assert count > free
        assert pool.free == free
    taken = [cell for cells in (*held, *adapters) for cell in cells]
    assert len(taken) == len({*taken}) == 10_000 - free
    for cells in (*held, *adapters):
        pool.give_back(cells)
    assert pool.free == 10_000
    with refuses("choice_error"):
        pool.give_back([3])


def test_admission_looks_at_the_worst_step_to_come() -> None:
    running, candidate = RowLoad(10, 5), RowLoad(4, 9)
    assert cells_needed([running, candidate]) == max(9 * 1 + 4, 5 * 2 + 14) == 24
    assert not admits([running], candidate, 24 + 96, [8, 16])
    assert admits([running], candidate, 25 + 96, [8, 16])
    generator = random.Random(2)
    for _ in range(300):
        rows = [RowLoad(generator.randrange(1, 30), generator.randrange(1, 20)) for _ in range(generator.randrange(6))]
        steps = range(max((row.left for row in rows), default=0) + 1)
        # A request holds its cells until it has ended.
        worst = max(sum(row.length + step for row in rows if row.left >= step) for step in steps)
        assert cells_needed(rows) == worst


RANKS = {f"a{i}": (64, 32, 16, 8)[i % 4] for i in range(40)}


def trace(seed: int, count: int = 120) -> list[TracedRequest]:
    """Requests at random times, few adapters asked for often and many rarely."""
    generator, step, found = random.Random(seed), 0, list[TracedRequest]()
    for _ in range(count):
        step += int(generator.expovariate(0.3))
        adapter = None if generator.random() < 0.1 else f"a{min(int(generator.paretovariate(0.7)) - 1, 39)}"
        found.append(TracedRequest(step, adapter, generator.randrange(4, 200), generator.randrange(4, 80)))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_both_allocators_answer_every_request_that_fits(seed: int) -> None:
    requests = trace(seed)
    paged = PagedAllocator(6000, 1, RANKS, rows=32)
    pages, places = paged.replay(requests), PlacedAllocator(6000, 1, RANKS, rows=12, longest=280).replay(requests)
    for report in (pages, places):
        assert (report.finished, report.refused) == (len(requests), 0)
        assert report.peak <= 6000
        assert 0 < report.hit_rate < 1
    assert paged.pool.free == 6000
    assert pages.fragmentation == 0 < places.fragmentation
    assert pages.prefetched > 0
    assert places.bytes_moved < pages.bytes_moved, "pages drop what no row uses; places keep it while there is room"


def test_rejects_only_requests_that_never_fit() -> None:
    requests = [TracedRequest(0, "a0", 10, 5), TracedRequest(0, "a0", 900, 200), TracedRequest(1, "a3", 10, 5)]
    for allocator in (PagedAllocator(800, 2, RANKS, 4), PlacedAllocator(1600, 2, RANKS, rows=2, longest=100)):
        report = allocator.replay(requests)
        assert (report.finished, report.refused) == (2, 1)
    with refuses("over_budget", match="take 4000 bytes of 1600"):
        PlacedAllocator(1600, 2, RANKS, rows=4, longest=500)


def test_adapters_are_fetched_at_the_fifth_and_seventh_step_of_ten() -> None:
    """The second comes while the first runs, and joins after ten steps with its adapter there."""
    allocator = PagedAllocator(1000, 1, RANKS, rows=4)
    early = allocator.replay([TracedRequest(0, "a0", 4, 30), TracedRequest(2, "a3", 4, 3)])
    late = allocator.replay([TracedRequest(0, "a0", 4, 30), TracedRequest(8, "a3", 4, 3)])
    assert (early.prefetched, early.hit_rate, early.waited) == (1, 0.5, 8)
    assert (late.prefetched, late.hit_rate, late.waited) == (0, 0.0, 2)
    assert early.bytes_moved == late.bytes_moved == adapter_cells(64) + adapter_cells(8)
