"""The running batch: a step computes a token of each generating row and a chunk of each prompt, in one call."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lorac.errors import OverBudget, Unavailable
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.generation.row_sampler import BatchSampler
from lorac.runtime.row_bank import RowBank
from lorac.runtime.scheduling.chunk_choice import choose_chunk, large_chunk
from lorac.runtime.scheduling.running_row import RunningRow
from lorac.runtime.scheduling.token_stream import wake_readers
from lorac.target.engine import BoundProgram
from lorac.target.kv_cache import DecodeStep, KeyValueCache

if TYPE_CHECKING:
    from lorac.runtime.generation.generate import GeneratingModel


class RunningBatch:
    """A batch that rows join and leave. Only one thread may use it at a time.

    Rows with different adapters share one engine call per step, whether a row has one token or a chunk of a prompt;
    choices that cannot share a call, such as one with a merged weight, take one call per choice.

    Args:
        model: the compiled model.
        rows: the most rows.
        chunk: the most tokens of each prompt per step; None: ``choose_chunk`` must be called first.
        prompts: the cache of keys and values for prompts with the same first tokens; None: no cache.
        graph: the graph that decodes.

    Attributes:
        is_shared: whether several tenants send requests; then no larger chunks are used.
    """

    is_shared = False

    def __init__(
        self, model: GeneratingModel, rows: int, chunk: int | None, prompts: PromptCache | None, graph: str
    ) -> None:
        self.model, self.graph, self.chunk, self.prompts = model, graph, chunk, prompts
        self._most_rows, self._chooses = rows, chunk is None
        self._bank: RowBank | None = None
        with contextlib.suppress(Unavailable):
            self._bank = model.switch.new_row_bank(rows, graph)
        self._lanes: dict[object, _Lane] = {}

    @property
    def rows(self) -> list[RunningRow]:
        """All rows of the batch; other threads may read this during a step."""
        return [row for lane in [*self._lanes.values()] for row in [*lane.rows]]

    @property
    def nbytes(self) -> dict[str, int]:
        """The bytes of "bank" (the rows' adapters) and of "kv" (keys and values)."""
        kv = sum(lane.cache.nbytes for lane in [*self._lanes.values()])
        return {"bank": 0 if self._bank is None else self._bank.nbytes, "kv": kv}

    def choose_chunk(self) -> None:
        """Choose the chunk by timing the model, unless the caller gave one."""
        if self.chunk is None:
            self.chunk = choose_chunk(self.model, self.graph, self._most_rows, self._bank)

    def admit(self, row: RunningRow) -> None:
        """Add a row; the next steps read its prompt.

        Raises:
            OverBudget: the memory budget has no room for the row now.
        """
        cache = row.begin(self.prompts)
        try:
            key = self._key(row)
            bank = self._bank if key is self._bank else None
            lane = self._lanes.get(key) or _Lane(self.model.engine.new_cache(self.graph, 0, 0), bank)
            lane.join(row, cache)
        except BaseException:
            row.let_go()
            raise
        self._lanes[key] = lane

    def step(self) -> None:
        """Compute the next tokens of every row; remove rows that end."""
        for key, lane in list(self._lanes.items()):
            try:
                self._advance(lane)
            except Exception as error:
                lane.end_all(error)
            if not lane.rows:
                del self._lanes[key]

    def _key(self, row: RunningRow) -> object:
        """Return a key that is equal for rows that may share a call: the bank, else the row's choice."""
        states = [phase.state for phase in row.phases]
        if self._bank is not None and not any(map(self._bank.why_apart, states)):
            return self._bank
        return row if len(states) > 1 else (row.state.choice, row.state.versions.versions)

    def _advance(self, lane: _Lane) -> None:
        """Compute new tokens of a lane's rows; draw the next token of rows whose whole text is in the cache."""
        self._remove(lane, [row.stream.interrupted or row.find_earlier_end() for row in lane.rows])
        if not lane.rows:
            return
        assert self.chunk is not None
        reading = sum(not row.is_read for row in self.rows)
        crowded = self._chooses and not self.is_shared and 2 * reading > len(self.rows)
        chunk = large_chunk(self.chunk, reading) if crowded else self.chunk
        # A chunk fits behind the longest row, so that padding the other rows to it takes no more memory.
        most = min(chunk, lane.cache.capacity - max(lane.cache.lengths))
        counts, left = list[int](), dict.fromkeys((row.request.tenant for row in self.rows), chunk)
        for row, past in zip(lane.rows, lane.cache.lengths, strict=True):
            tenant, count = row.request.tenant, min(most, row.count_left(past))
            if len(left) > 1 and not row.is_read:
                count = count if count <= left[tenant] else 0  # never a part of a chunk: its size affects rounding
                left[tenant] -= count
            counts.append(row.leave_block(past, count))
        texts = [row.fed[past : past + n] for row, past, n in zip(lane.rows, lane.cache.lengths, counts, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        wanted = torch.tensor(counts)[:, None] - 1
        logits = lane.bind().decode(self.graph, lane.cache, DecodeStep(ids=ids, counts=counts, wanted=wanted))[:, 0]
        lengths = lane.cache.lengths
        computed = [place for place, row in enumerate(lane.rows) if lengths[place] == len(row.text)]
        if computed:
            self._draw(lane, computed, logits[computed])

    def _draw(self, lane: _Lane, places: Sequence[int], logits: Tensor) -> None:
        """Draw a token for the rows in these places from their logits (places, vocabulary); remove rows that end."""
        rows = [lane.rows[place] for place in places]
        sampler, reasons = lane.sampler_of(rows), [""] * len(lane.rows)
        for index, token in enumerate(sampler.draw([row.text for row in rows], logits).tolist()):
            reasons[places[index]] = rows[index].take(token, logits[index], sampler.failed.get(index))
        wake_readers(row.stream for row in rows)
        self._remove(lane, reasons)

    def _remove(self, lane: _Lane, reasons: Sequence[str]) -> None:
        """Remove the rows of a lane that have a reason to end."""
        ended = {place: reason for place, reason in enumerate(reasons) if reason}
        for place, reason in ended.items():
            self._end(lane.rows[place], reason, lane.cache, place)
        if ended:
            lane.remove(ended)

    def _end(self, row: RunningRow, reason: str, cache: KeyValueCache, place: int) -> None:
        """End a row, and copy its keys and values into the prompt cache, if the memory budget allows."""
        if row.limit is not None and cache.is_croppable:
            cache.crop([min(n, row.limit) if at == place else n for at, n in enumerate(cache.lengths)])
        known = row.limit is None or cache.is_croppable
        if self.prompts is not None and known and cache.lengths[place] and not row.is_kept:
            with contextlib.suppress(OverBudget):
                copy = cache.copy([place])
                self.prompts.add(self.model.engine, row.key, [row.keyed[: copy.lengths[0]]], copy)
        row.end(reason)


class _Lane:
    """Rows that share an engine call.

    Args:
        cache: a cache without rows.
        bank: the places for the rows' own adapters; None where all rows have one choice.
    """

    def __init__(self, cache: KeyValueCache, bank: RowBank | None = None) -> None:
        self.cache, self.bank = cache, bank
        self.rows: list[RunningRow] = []
        self._drawing: tuple[list[RunningRow], BatchSampler] | None = None

    def sampler_of(self, rows: list[RunningRow]) -> BatchSampler:
        """Return the sampler of some rows, cached until other rows are given."""
        if self._drawing is None or self._drawing[0] != rows:
            self._drawing = rows, BatchSampler([row.sampler for row in rows])
        return self._drawing[1]

    def bind(self) -> BoundProgram:
        """Return the engine's program for the rows: of their one choice where all rows share it, else of the bank."""
        one = self.rows[0]
        if self.bank is None or all(row.state is one.state for row in self.rows):
            return one.program
        for place, row in enumerate(self.rows):
            self.bank.admit(place, row.state)  # rows move to the places of rows that were removed
        return self.bank.bound(len(self.rows))

    def join(self, row: RunningRow, cache: KeyValueCache) -> None:
        """Add a row, and join its cache to the lane's.

        Raises:
            OverBudget: the memory budget has no room for the row's cache or adapters.
        """
        if self.bank is not None:
            self.bank.admit(len(self.rows), row.state)
        self.cache.join(cache)
        self.rows.append(row)

    def end_all(self, error: Exception) -> None:
        """End all rows of this lane with an error; rows of other lanes go on."""
        for row in self.rows:
            row.end("error", error)
        self.rows.clear()

    def remove(self, places: Collection[int]) -> None:
        """Remove rows by place."""
        self.rows[:] = [self.rows[place] for place in self.cache.remove(places)]
