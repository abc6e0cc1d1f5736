"""Paged memory for adapters and caches, simulated: S-LoRA's pool of cells beside places under a budget of bytes.

Sheng et al. 2024, "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", arXiv 2311.03285. One pool of cells holds
the keys and values of tokens, one cell each, and adapters of rank r, 4 r cells each; a cell has as many elements as a
hidden state. Nothing here computes with a model: a trace of requests is replayed, and what each allocator does is
counted.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lorac.errors import ChoiceError, OverBudget

Array = npt.NDArray[np.float64]
PROJECTIONS = 4
"""Adapted projections of a layer: q, k, v and o."""
JOIN_EVERY, PREFETCH_AT = 10, (5, 7)
"""Decoding steps after which waiting requests may join, and the steps between at which their adapters are fetched."""


class CellPool:
    """Cells of equal size, of which any free ones are given out: nothing is lost to fragmentation.

    Args:
        cells: the number of cells.
    """

    def __init__(self, cells: int) -> None:
        self._free = list(range(cells - 1, -1, -1))
        self._taken: set[int] = set()
        self.cells = cells

    @property
    def free(self) -> int:
        """The number of free cells."""
        return len(self._free)

    def take(self, count: int) -> tuple[int, ...]:
        """Return so many cells, in no order.

        Raises:
            OverBudget: fewer are free; then none is taken.
        """
        if count > len(self._free):
            raise OverBudget(
                f"{count} cells are asked for, and {len(self._free)} of {self.cells} are free",
                next_step="wait until a request ends",
            )
        taken = tuple(self._free.pop() for _ in range(count))
        self._taken.update(taken)
        return taken

    def give_back(self, cells: Iterable[int]) -> None:
        """Free cells.

        Raises:
            ChoiceError: one of them is free.
        """
        cells = tuple(cells)
        if len({*cells}) < len(cells) or not self._taken.issuperset(cells):
            raise ChoiceError("a cell is given back that nobody has", next_step="give back each cell once")
        self._taken.difference_update(cells)
        self._free.extend(cells)


def adapter_cells(rank: int) -> int:
    """Return the cells of an adapter of a rank."""
    return PROJECTIONS * rank


def pack_adapter(A: Array, B: Array, hidden: int) -> tuple[Array, Array]:
    """Return the rows of one projection's cells in the pools of keys and of values.

    Args:
        A: (r, hidden), one row per cell.
        B: (hidden, r), packed by outputs: B[o, j] is at the flat position o·r + j.
        hidden: elements of a cell.

    Returns:
        (r, hidden) each.
    """
    return A.copy(), B.reshape(-1, hidden)


def unpack_adapter(keys: Array, values: Array) -> tuple[Array, Array]:
    """Invert ``pack_adapter``."""
    return keys.copy(), values.reshape(-1, keys.shape[0])


@dataclass(frozen=True)
class RowLoad:
    """The tokens of a request so far, and how many it may still get."""

    length: int
    left: int


def cells_needed(rows: Iterable[RowLoad]) -> int:
    """Return the most cells that requests take together at any time until all have ended.

    Sorted by what is left, the i-th (from 0) ends when the i + 1 longest have each got as many tokens more.
    """
    most = so_far = 0
    for place, row in enumerate(sorted(rows, key=lambda row: -row.left)):
        so_far += row.length
        most = max(most, row.left * (place + 1) + so_far)
    return most


def admits(running: Iterable[RowLoad], candidate: RowLoad, cells: int, ranks: Iterable[int]) -> bool:
    """Return whether a request may join: everybody reaches the end with what the adapters leave.

    Args:
        cells: of the pool.
        ranks: of the distinct adapters of all of them.
    """
    return cells_needed((*running, candidate)) < cells - sum(map(adapter_cells, ranks))


@dataclass(frozen=True, eq=False)
class TracedRequest:
    """A request of a trace.

    Attributes:
        arrives: the decoding step at which it comes.
        adapter: the name of its adapter; None: the base.
        prompt, new: its tokens.
    """

    arrives: int
    adapter: str | None
    prompt: int
    new: int


@dataclass(frozen=True)
class ReplayReport:
    """The results of an allocator for a trace.

    Attributes:
        finished: requests that were answered.
        refused: requests that could never fit.
        steps: decoding steps.
        waited: steps that requests waited for their turn, in all.
        hit_rate: how often a request's adapter was there when it joined.
        bytes_moved: what was copied in for adapters.
        prefetched: how many adapters were fetched while others were computed.
        fragmentation: the part of taken memory that held nothing, averaged over steps.
        peak: the most bytes taken.
    """

    finished: int
    refused: int
    steps: int
    waited: int
    hit_rate: float
    bytes_moved: int
    prefetched: int
    fragmentation: float
    peak: int


@dataclass
class _Row:
    """A request that runs, and its memory: cells, or the tokens that its place is long."""

    request: TracedRequest
    done: int
    memory: tuple[int, ...]

    @property
    def load(self) -> RowLoad:
        return RowLoad(self.request.prompt + self.done, self.request.new - self.done)


@dataclass
class _Counts:
    """Counters of a trace while it is replayed."""

    finished: int = 0
    refused: int = 0
    steps: int = 0
    waited: int = 0
    hits: int = 0
    misses: int = 0
    moved: int = 0
    prefetched: int = 0
    idle: float = 0.0
    peak: int = 0

    def report(self) -> ReplayReport:
        asked = self.hits + self.misses
        return ReplayReport(
            finished=self.finished,
            refused=self.refused,
            steps=self.steps,
            waited=self.waited,
            hit_rate=self.hits / asked if asked else 1.0,
            bytes_moved=self.moved,
            prefetched=self.prefetched,
            fragmentation=self.idle / self.steps if self.steps else 0.0,
            peak=self.peak,
        )


class PagedAllocator:
    """S-LoRA's: cells for tokens and adapters alike, joining every ten steps, prefetching at two of them.

    Args:
        cells: of the pool.
        cell_bytes: of a cell in all layers, keys and values together.
        ranks: adapter -> its rank.
        rows: the most requests that run together.
    """

    def __init__(self, cells: int, cell_bytes: int, ranks: Mapping[str, int], rows: int) -> None:
        self.pool, self.cell_bytes, self.ranks, self.rows = CellPool(cells), cell_bytes, ranks, rows
        self.resident: dict[str, tuple[int, ...]] = {}

    def replay(self, trace: Sequence[TracedRequest]) -> ReplayReport:
        """Replay a trace to its end."""
        counts, running = _Counts(), list[_Row]()
        waiting = sorted(trace, key=lambda request: request.arrives)
        while waiting or running:
            turn = counts.steps % JOIN_EVERY
            arrived = [request for request in waiting if request.arrives <= counts.steps]
            gone = self._join(arrived, running, counts) if turn == 0 or not running else []
            waiting = [request for request in waiting if request not in gone]
            if turn in PREFETCH_AT:
                self._prefetch([request for request in arrived if request not in gone], running, counts)
            counts.waited += sum(request.arrives <= counts.steps for request in waiting)
            self._step(running, counts)
        self._evict(())
        return counts.report()

    def _join(self, arrived: list[TracedRequest], running: list[_Row], counts: _Counts) -> list[TracedRequest]:
        """Let requests join in their order, up to the first that does not fit; return those that left the line."""
        gone, names = list[TracedRequest](), {row.request.adapter for row in running}
        loads, joining = [row.load for row in running], list[TracedRequest]()
        for request in arrived:
            load = RowLoad(request.prompt, request.new)
            if not admits((), load, self.pool.cells, self._ranks({request.adapter})):
                counts.refused += 1
                gone.append(request)
                continue
            together = names | {request.adapter}
            if len(loads) >= self.rows or not admits(loads, load, self.pool.cells, self._ranks(together)):
                break
            names, loads = together, [*loads, load]
            joining.append(request)
        self._evict(names)
        for request in joining:
            self._load(request.adapter, counts)
            running.append(_Row(request, 0, self.pool.take(request.prompt)))
        return gone + joining

    def _ranks(self, names: Iterable[str | None]) -> list[int]:
        return [self.ranks[name] for name in names if name is not None]

    def _load(self, name: str | None, counts: _Counts, *, ahead: bool = False) -> None:
        """Bring an adapter in, unless it is there."""
        if name is None or name in self.resident:
            counts.hits += name is not None and not ahead
            return
        count = adapter_cells(self.ranks[name])
        self.resident[name] = self.pool.take(count)
        counts.moved += count * self.cell_bytes
        counts.misses += not ahead
        counts.prefetched += ahead

    def _prefetch(self, arrived: list[TracedRequest], running: list[_Row], counts: _Counts) -> None:
        """Fetch adapters of requests that will join next, as far as there are cells that nobody will need."""
        held = cells_needed([row.load for row in running])
        for request in arrived[: self.rows - len(running)]:
            if request.adapter is None or request.adapter in self.resident:
                continue
            taken = sum(map(len, self.resident.values()))
            if held + taken + adapter_cells(self.ranks[request.adapter]) < self.pool.cells:
                self._load(request.adapter, counts, ahead=True)

    def _evict(self, names: Iterable[str | None]) -> None:
        """Drop the adapters that are not named."""
        for name in sorted(self.resident.keys() - {*names}):
            self.pool.give_back(self.resident.pop(name))

    def _step(self, running: list[_Row], counts: _Counts) -> None:
        for row in running:
            row.memory += self.pool.take(1)
            row.done += 1
        taken = (self.pool.cells - self.pool.free) * self.cell_bytes
        counts.peak, counts.steps = max(counts.peak, taken), counts.steps + 1
        for row in [row for row in running if row.done == row.request.new]:
            self.pool.give_back(row.memory)
            running.remove(row)
            counts.finished += 1


class PlacedAllocator:
    """lorac's: a fixed number of rows as long as the longest, and prepared adapters in what a budget leaves.

    Args:
        budget: bytes for rows and adapters.
        token_bytes: of a token's keys and values in all layers.
        ranks: adapter -> its rank.
        rows: places for requests.
        longest: tokens that a place has room for.
    """

    def __init__(self, budget: int, token_bytes: int, ranks: Mapping[str, int], rows: int, longest: int) -> None:
        self.token_bytes, self.ranks, self.rows, self.longest = token_bytes, ranks, rows, longest
        self.room = budget - rows * longest * token_bytes
        self.budget = budget
        self.kept: collections.OrderedDict[str, int] = collections.OrderedDict()
        if self.room < 0:
            raise OverBudget(
                f"{rows} rows of {longest} tokens take {budget - self.room} bytes of {budget}",
                next_step="give fewer or shorter rows",
            )

    def replay(self, trace: Sequence[TracedRequest]) -> ReplayReport:
        """Replay a trace to its end."""
        counts, running = _Counts(), list[_Row]()
        waiting = collections.deque(sorted(trace, key=lambda request: request.arrives))
        while waiting or running:
            while waiting and waiting[0].arrives <= counts.steps and self._join(waiting[0], running, counts):
                waiting.popleft()
            counts.waited += sum(request.arrives <= counts.steps for request in waiting)
            self._step(running, counts)
        return counts.report()

    def _join(self, request: TracedRequest, running: list[_Row], counts: _Counts) -> bool:
        """Let a request join, or refuse it if it never fits; return whether it left the line."""
        if request.prompt + request.new > self.longest or self._size(request.adapter) > self.room:
            counts.refused += 1
            return True
        if len(running) >= self.rows or not self._load(request.adapter, running, counts):
            return False
        running.append(_Row(request, 0, ()))
        return True

    def _size(self, name: str | None) -> int:
        """Return an adapter's bytes: a row of A or B is as large as half a token's keys and values in all layers."""
        return 0 if name is None else adapter_cells(self.ranks[name]) * self.token_bytes

    def _load(self, name: str | None, running: list[_Row], counts: _Counts) -> bool:
        """Bring an adapter in; the least recently used that no row runs with make room. Return whether it is there."""
        if name is None:
            return True
        if name in self.kept:
            self.kept.move_to_end(name)
            counts.hits += 1
            return True
        used = {row.request.adapter for row in running}
        missing = sum(self.kept.values()) + self._size(name) - self.room
        victims = []
        for other in (other for other in self.kept if other not in used):
            if missing <= 0:
                break
            victims.append(other)
            missing -= self.kept[other]
        if missing > 0:
            return False
        for other in victims:
            del self.kept[other]
        self.kept[name] = self._size(name)
        counts.misses += 1
        counts.moved += self._size(name)
        return True

    def _step(self, running: list[_Row], counts: _Counts) -> None:
        for row in running:
            row.done += 1
        places, adapters = self.rows * self.longest * self.token_bytes, sum(self.kept.values())
        tokens = sum(row.request.prompt + row.done for row in running) * self.token_bytes
        counts.idle += (places - tokens) / (places + adapters)
        counts.peak, counts.steps = max(counts.peak, places + adapters), counts.steps + 1
        ended = [row for row in running if row.done == row.request.new]
        counts.finished += len(ended)
        for row in ended:
            running.remove(row)
