"""The rows at work: a step gives each running row a token, and reads a chunk of one prompt."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch

from lorac.errors import OverBudget, Unavailable
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.generation.row_sampler import BatchSampler
from lorac.runtime.row_bank import RowBank
from lorac.runtime.scheduling.chunk_choice import LEAST_IDLE, choose_chunk
from lorac.runtime.scheduling.running_row import RunningRow
from lorac.target.engine import BoundProgram
from lorac.target.kv_cache import DecodeStep, KeyValueCache

if TYPE_CHECKING:
    from lorac.runtime.switchable_model import SwitchableModel


class RunningBatch:
    """Rows that come and go. Only one thread may use it at a time.

    Rows with adapters of their own share one engine call per step; rows of a choice that cannot share it, such as one
    with a merged weight, have a call per choice. A prompt is read in a cache of its own, in chunks, so that running
    rows are never padded to it nor wait for all of it.

    Args:
        model: the compiled model.
        rows: the most rows at work.
        chunk: the most tokens of a prompt per step; None: ``choose_chunk`` must be called first.
        prompts: keeps what rows computed, for prompts that begin alike; None keeps nothing.
        graph: decodes.

    Attributes:
        reading: rows whose prompts are being computed.
    """

    def __init__(
        self, model: SwitchableModel, rows: int, chunk: int | None, prompts: PromptCache | None, graph: str
    ) -> None:
        self.model, self.graph, self.chunk, self.prompts = model, graph, chunk, prompts
        self._most_rows, self._idle_chunk = rows, chunk
        self.reading: collections.deque[RunningRow] = collections.deque()
        self._ready: collections.deque[RunningRow] = collections.deque()
        self._bank: RowBank | None = None
        with contextlib.suppress(Unavailable):
            self._bank = model.new_row_bank(rows, graph)
        self._lanes: dict[object, _Lane] = {}

    @property
    def running(self) -> list[RunningRow]:
        """The rows that get tokens; another thread may ask while a step changes them."""
        return [row for lane in [*self._lanes.values()] for row in [*lane.rows]]

    @property
    def rows(self) -> list[RunningRow]:
        """All rows at work."""
        return [*self.running, *self._ready, *self.reading]

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of "bank", which holds the rows' adapters, and of "kv", their keys and values."""
        caches = [lane.cache for lane in [*self._lanes.values()]]
        waiting = [row.cache for row in [*self._ready, *self.reading] if hasattr(row, "cache")]
        kv = sum(cache.nbytes for cache in [*caches, *waiting])
        return {"bank": 0 if self._bank is None else self._bank.nbytes, "kv": kv}

    def choose_chunk(self) -> None:
        """Choose how many tokens of a prompt a step reads, unless that is given; more of them where no row runs."""
        if self.chunk is None:
            self.chunk = choose_chunk(self.model, self.graph, self._most_rows, self._bank)
            self._idle_chunk = max(self.chunk, LEAST_IDLE)

    def admit(self, row: RunningRow) -> None:
        """Begin to read a row's prompt.

        Raises:
            OverBudget: there is no memory for it now.
        """
        row.begin(self.prompts)
        self.reading.append(row)

    def step(self) -> None:
        """Give every running row a token, and read a chunk of one prompt; rows that end leave."""
        for key, lane in list(self._lanes.items()):
            self._guard(lane.rows, lambda lane=lane: self._decode(lane))  # type: ignore[misc]  # mypy infers no lambda
            if not lane.rows:
                del self._lanes[key]
        while self._ready and self._join(self._ready[0]):
            self._ready.popleft()
        if self.reading:
            row = self.reading[0]
            self._guard([row], lambda: self._read(row))
            if row.stream.reason and row in self.reading:
                self.reading.remove(row)

    def _guard(self, rows: list[RunningRow], work: Callable[[], object]) -> None:
        """Run work of some rows; an error ends them, and no others."""
        try:
            work()
        except Exception as error:
            for row in rows:
                row.end("error", error)
            rows.clear()

    # ── A prompt ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def _read(self, row: RunningRow) -> None:
        reason, logits = row.stream.interrupted or row.find_earlier_end(), None
        if not reason:
            tokens = self.chunk if self.running else self._idle_chunk
            assert tokens is not None
            logits = row.read(tokens)
        if logits is not None:
            reason = row.draw(logits)
        if reason:
            self._end(row, reason, row.cache, 0)
        elif logits is None:
            self.reading.rotate(-1)
        else:
            self.reading.remove(row)
            if self._ready or not self._join(row):
                self._ready.append(row)

    def _join(self, row: RunningRow) -> bool:
        """Make a row run, and return True; leave it as it is where memory is only free when others end."""
        try:
            if not self._join_bank(row):
                self._join_choice(row)
        except Exception as error:
            if isinstance(error, OverBudget) and self.running:
                return False
            row.end("error", error)
        return True

    def _join_choice(self, row: RunningRow) -> None:
        """Make a row one of those with its choice."""
        key = (row.state.choice, row.state.versions.versions)
        lane = self._lanes.get(key) or _Lane(self._new_cache())
        lane.join(row)
        self._lanes[key] = lane

    def _join_bank(self, row: RunningRow) -> bool:
        """Make a row one of those with adapters of their own, if it can be."""
        bank = self._bank
        if bank is None:
            return False
        lane = self._lanes.get(bank) or _Lane(self._new_cache(), bank)
        try:
            bank.admit(len(lane.rows), row.state)
        except Unavailable:
            return False
        lane.join(row)
        self._lanes[bank] = lane
        return True

    def _new_cache(self) -> KeyValueCache:
        return self.model.engine.new_cache(self.graph, 0, 0)

    # ── A token for each row ─────────────────────────────────────────────────────────────────────────────────────────
    def _decode(self, lane: _Lane) -> None:
        self._remove(lane, [row.stream.interrupted for row in lane.rows])
        if not lane.rows:
            return
        ids, count = torch.stack([row.text[-1:] for row in lane.rows]), len(lane.rows)
        step = DecodeStep(ids=ids, counts=[1] * count, wanted=torch.zeros_like(ids))
        logits = lane.program.decode(self.graph, lane.cache, step)[:, 0]
        tokens = lane.sampler.draw([row.text for row in lane.rows], logits).tolist()
        drawn, failed = zip(lane.rows, tokens, logits, strict=True), lane.sampler.failed
        reasons = [row.take(token, scores, failed.get(place)) for place, (row, token, scores) in enumerate(drawn)]
        self._remove(lane, reasons)

    def _remove(self, lane: _Lane, reasons: Sequence[str]) -> None:
        """Take the rows out of a batch that end for some reason."""
        ended = {place: reason for place, reason in enumerate(reasons) if reason}
        for place, reason in ended.items():
            self._end(lane.rows[place], reason, lane.cache, place)
        if ended:
            lane.remove(ended)

    def _end(self, row: RunningRow, reason: str, cache: KeyValueCache, place: int) -> None:
        """End a row, and keep its keys and values for prompts that begin alike, if there is room for a copy."""
        if self.prompts is not None:
            with contextlib.suppress(OverBudget):
                copy = cache.copy([place])
                self.prompts.add(self.model.engine, row.key, [row.text[: copy.lengths[0]]], copy)
        row.end(reason)


class _Lane:
    """Rows that share an engine call.

    Args:
        cache: of no rows yet.
        bank: holds the rows' own adapters, if they may have such.
    """

    def __init__(self, cache: KeyValueCache, bank: RowBank | None = None) -> None:
        self.cache, self.bank = cache, bank
        self.rows: list[RunningRow] = []
        self.sampler = BatchSampler([])

    @property
    def program(self) -> BoundProgram:
        """The engine's program for the rows: one choice that all of them have is read once, not for each row."""
        first, *rest = self.rows
        if self.bank is None or all(row.state is first.state for row in rest):
            return first.program
        return self.bank.bound(len(self.rows))

    def join(self, row: RunningRow) -> None:
        self.cache.join(row.cache)
        del row.cache
        self.rows.append(row)
        self.sampler = BatchSampler([row.sampler for row in self.rows])

    def remove(self, places: Collection[int]) -> None:
        order = self.cache.remove(places)
        if self.bank is not None:
            self.bank.move(order)
        self.rows[:] = [self.rows[place] for place in order]
        self.sampler = BatchSampler([row.sampler for row in self.rows])
