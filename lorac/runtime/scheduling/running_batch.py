"""The rows at work: a step gives each running row a token, and reads a chunk of each prompt."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorac.errors import OverBudget, Unavailable
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.generation.row_sampler import BatchSampler
from lorac.runtime.row_bank import RowBank
from lorac.runtime.scheduling.chunk_choice import choose_chunk, large_chunk
from lorac.runtime.scheduling.running_row import RunningRow
from lorac.target.engine import BoundProgram
from lorac.target.kv_cache import DecodeStep, KeyValueCache

if TYPE_CHECKING:
    from lorac.runtime.switchable_model import SwitchableModel


class RunningBatch:
    """Rows that come and go. Only one thread may use it at a time.

    Rows with adapters of their own share one engine call per step; rows of a choice that cannot share it, such as one
    with a merged weight, have a call per choice. Prompts are read in calls of their own, in chunks, so that running
    rows are never padded to them nor wait for all of them; prompts that come together share such a call.

    Args:
        model: the compiled model.
        rows: the most rows at work.
        chunk: the most tokens of each prompt per step; None: ``choose_chunk`` must be called first.
        prompts: keeps what rows computed, for prompts that begin alike; None keeps nothing.
        graph: decodes.
    """

    def __init__(
        self, model: SwitchableModel, rows: int, chunk: int | None, prompts: PromptCache | None, graph: str
    ) -> None:
        self.model, self.graph, self.chunk, self.prompts = model, graph, chunk, prompts
        self._most_rows, self._chooses = rows, chunk is None
        self._bank: RowBank | None = None
        with contextlib.suppress(Unavailable):
            self._bank = model.new_row_bank(rows, graph)
        self._reading: dict[object, _Lane] = {}
        self._lanes: dict[object, _Lane] = {}

    @property
    def running(self) -> list[RunningRow]:
        """The rows that get tokens; another thread may ask while a step changes them."""
        return [row for lane in [*self._lanes.values()] for row in [*lane.rows]]

    @property
    def rows(self) -> list[RunningRow]:
        """All rows at work, each once: a row that begins to run is in a lane of both kinds for a moment."""
        reading = [row for lane in [*self._reading.values()] for row in [*lane.rows]]
        return [*dict.fromkeys([*self.running, *reading])]

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of "bank", which holds the rows' adapters, and of "kv", their keys and values."""
        kv = sum(lane.cache.nbytes for lane in [*self._lanes.values(), *self._reading.values()])
        return {"bank": 0 if self._bank is None else self._bank.nbytes, "kv": kv}

    def choose_chunk(self) -> None:
        """Choose how many tokens of a prompt a step reads, unless that is given."""
        if self.chunk is None:
            self.chunk = choose_chunk(self.model, self.graph, self._most_rows, self._bank)

    def admit(self, row: RunningRow) -> None:
        """Begin to read a row's prompt.

        Raises:
            OverBudget: there is no memory for it now.
        """
        cache = row.begin(self.prompts)
        try:
            key = self._key(row)
            lane = self._reading.get(key) or self._new_lane(key)
            lane.join(row, cache)
        except BaseException:
            row.let_go()
            raise
        self._reading[key] = lane

    def step(self) -> None:
        """Give every running row a token, and read a chunk of each prompt; rows that end leave."""
        self._run_lanes(self._lanes, self._decode)
        self._run_lanes(self._reading, self._read)

    def _run_lanes(self, lanes: dict[object, _Lane], work: Callable[[_Lane], None]) -> None:
        for key, lane in list(lanes.items()):
            self._guard(lane.rows, functools.partial(work, lane))
            if not lane.rows:
                lanes.pop(key, None)

    def _guard(self, rows: list[RunningRow], work: Callable[[], object]) -> None:
        """Run work of some rows; an error ends them, and no others."""
        try:
            work()
        except Exception as error:
            for row in rows:
                row.end("error", error)
            rows.clear()

    def _key(self, row: RunningRow) -> object:
        """Return what rows have in common that may share a call: the bank, or else their choice."""
        if self._bank is not None and self._bank.why_apart(row.state) is None:
            return self._bank
        return (row.state.choice, row.state.versions.versions)

    def _new_lane(self, key: object) -> _Lane:
        return _Lane(self.model.engine.new_cache(self.graph, 0, 0), self._bank if key is self._bank else None)

    # ── Prompts ──────────────────────────────────────────────────────────────────────────────────────────────────────
    def _read(self, lane: _Lane) -> None:
        """Read a chunk of each prompt; rows whose prompts are read get their first token, and run."""
        self._remove(lane, [row.stream.interrupted or row.find_earlier_end() for row in lane.rows])
        self._run_ready(lane)
        if not lane.unread:
            return
        program, counts = self._plan_reading(lane)
        texts = [row.text[read : read + n] for row, read, n in zip(lane.rows, lane.cache.lengths, counts, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        wanted = torch.tensor([[max(count - 1, 0)] for count in counts])
        logits = program.decode(self.graph, lane.cache, DecodeStep(ids=ids, counts=counts, wanted=wanted))[:, 0]
        lengths = lane.cache.lengths
        ended = [place for place, row in enumerate(lane.rows) if counts[place] and lengths[place] == len(row.text)]
        for place in ended:
            lane.rows[place].is_read = True
        if ended:
            self._draw(lane, ended, logits[ended])
        self._run_ready(lane)

    def _plan_reading(self, lane: _Lane) -> tuple[BoundProgram, list[int]]:
        """Return the program that reads the prompts of a lane, and how many tokens of each."""
        assert self.chunk is not None
        reading = lane.unread
        crowded = self._chooses and len(reading) > len(self.running)
        chunk = large_chunk(self.chunk, len(reading)) if crowded else self.chunk
        try:
            program = lane.bind(self._most_rows - len(lane.rows))
        except OverBudget:  # their adapters need not have room together: those of one choice are read without
            program, reading = reading[0].program, [row for row in reading if row.state is reading[0].state]
        left = [len(row.text) - read for row, read in zip(lane.rows, lane.cache.lengths, strict=True)]
        return program, [min(chunk, n) if row in reading else 0 for row, n in zip(lane.rows, left, strict=True)]

    def _run_ready(self, prompts: _Lane) -> None:
        """Make the rows run whose prompts are read, in their order, until memory is only free when others end."""
        ready = [place for place, row in enumerate(prompts.rows) if row.is_read]
        if ready and not prompts.unread and self._run_all(prompts):
            return
        left = list(itertools.takewhile(lambda place: self._join(prompts, place), ready))
        if left:
            prompts.remove(left)

    def _run_all(self, prompts: _Lane) -> bool:
        """Make a whole lane run, without copying its cache; return False where others run that it shares calls with."""
        key = self._key(prompts.rows[0])
        if key in self._lanes:
            return False
        try:
            prompts.place_adapters()
        except OverBudget:  # for all of them together
            return False
        self._lanes[key] = self._reading.pop(key)
        return True

    def _join(self, prompts: _Lane, place: int) -> bool:
        """Make a row run, and return True; leave it as it is where memory is only free when others end or are read."""
        row = prompts.rows[place]
        try:
            key = self._key(row)
            lane = self._lanes.get(key) or self._new_lane(key)
            if lane.bank is not None:
                lane.bank.admit(len(lane.rows), row.state)
            lane.join(row, prompts.cache.copy([place]))
            self._lanes[key] = lane
        except Exception as error:
            if isinstance(error, OverBudget) and (self.running or not all(other.is_read for other in self.rows)):
                return False
            row.end("error", error)
        return True

    # ── A token for each row ─────────────────────────────────────────────────────────────────────────────────────────
    def _decode(self, lane: _Lane) -> None:
        self._remove(lane, [row.stream.interrupted for row in lane.rows])
        if not lane.rows:
            return
        ids = torch.stack([row.text[-1:] for row in lane.rows])
        step = DecodeStep(ids=ids, counts=[1] * len(ids), wanted=torch.zeros_like(ids))
        self._draw(lane, range(len(ids)), lane.bind().decode(self.graph, lane.cache, step)[:, 0])

    def _draw(self, lane: _Lane, places: Sequence[int], logits: Tensor) -> None:
        """Draw a token for the rows in some places from their logits (places, vocabulary); rows that end leave."""
        rows = [lane.rows[place] for place in places]
        sampler = lane.sampler if len(rows) == len(lane.rows) else BatchSampler([row.sampler for row in rows])
        reasons = [""] * len(lane.rows)
        for index, token in enumerate(sampler.draw([row.text for row in rows], logits).tolist()):
            reasons[places[index]] = rows[index].take(token, logits[index], sampler.failed.get(index))
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
        self._sampler: BatchSampler | None = None

    @property
    def sampler(self) -> BatchSampler:
        """Draws a token for each row."""
        if self._sampler is None:
            self._sampler = BatchSampler([row.sampler for row in self.rows])
        return self._sampler

    @property
    def unread(self) -> list[RunningRow]:
        """The rows of whose prompts a part is still to be read."""
        return [row for row in self.rows if not row.is_read]

    def bind(self, first: int = 0) -> BoundProgram:
        """Return the engine's program for the rows: one choice that all of them have is read once, not for each row.

        Args:
            first: of the bank's places that the rows take.

        Raises:
            OverBudget: the bank has no room for their adapters.
        """
        one = self.rows[0]
        if self.bank is None or all(row.state is one.state for row in self.rows):
            return one.program
        self.place_adapters(first)
        return self.bank.bound(len(self.rows), first)

    def place_adapters(self, first: int = 0) -> None:
        """Write the rows' adapters into the bank's places, from one on.

        Raises:
            OverBudget: the bank has no room for them.
        """
        if self.bank is not None:
            for place, row in enumerate(self.rows, first):
                self.bank.admit(place, row.state)

    def join(self, row: RunningRow, cache: KeyValueCache) -> None:
        """Add a row, whose keys and values a cache of its own holds."""
        self.cache.join(cache)
        self.rows.append(row)
        self._sampler = None

    def remove(self, places: Collection[int]) -> None:
        """Drop some rows."""
        self.rows[:] = [self.rows[place] for place in self.cache.remove(places)]
        self._sampler = None
