"""Continuous batching: requests of many tenants with adapters of their own, computed together step by step."""

from __future__ import annotations

import atexit
import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING

import torch

from lorac.argument_types import check_type
from lorac.errors import InputMismatch, OverBudget, Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.scheduling.running_batch import RunningBatch
from lorac.runtime.scheduling.running_row import RunningRow
from lorac.runtime.scheduling.shared_line import check_line
from lorac.runtime.scheduling.token_stream import TextRequest, TokenStream

if TYPE_CHECKING:
    from lorac.runtime.generation.generating_model import GeneratingModel

_SHARED, _RECENT = 4, 60.0
"""The number of rows from which on some are kept for tenants, and the seconds for which a request lets them be."""


class Scheduler(contextlib.AbstractContextManager["Scheduler"]):
    """A compiled model that answers many requests at once, in a thread of its own.

    A step computes one token for every running row and a chunk of each prompt, in one engine call whatever adapters
    they have. The next row goes to the tenant with the fewest, and among these to the request that has waited longest.
    While others sent a request within the last minute, a tenant has at most half of four rows or more, and one is kept
    free for those without rows; while several have rows, a step reads one chunk for each tenant. A request begins when
    there is a row and memory for it (``compiled.memory``). Adapters may be added, removed and swapped meanwhile; a
    request keeps those that it began with.

    Args:
        compiled: compiled with ``cache=True``.
        rows: the most requests at work.
        waiting: the most that wait; a tenant with less than its share of them waits too while others' fill the line.
        chunk: the most tokens of each prompt per step. Running requests wait for them: with more, prompts are read
            sooner, and the others' next tokens come later. Default: as many as make a step of half the rows take half
            as long again, but at least 4, or 64 while a tenant is alone and has more prompts that are read than
            requests that run (256 of all prompts together); the model is timed once, before the first request begins.
        prompt_cache: bytes of keys and values that are cached for prompts that begin alike; 0 caches nothing.
        component: which of several models decodes.

    Raises:
        Unavailable: the program keeps no cache, or is an encoder-decoder.
    """

    def __init__(
        self,
        compiled: GeneratingModel,
        rows: int = 8,
        waiting: int = 64,
        chunk: int | None = None,
        *,
        prompt_cache: int = 1 << 26,
        component: str = MAIN_GRAPH,
    ) -> None:
        numbers = {"rows": rows, "waiting": waiting, "prompt_cache": prompt_cache}
        for name, value in (numbers if chunk is None else {**numbers, "chunk": chunk}).items():
            check_type(value, int, f"{name}= of lorac.Scheduler", next_step="give a whole number")
        spec = compiled.engine.cache_spec(component)
        if spec is None:
            compiled.engine.refuse_cache()
        if spec.encodes:
            raise Unavailable("an encoder-decoder has no scheduler", next_step="call compiled.generate")
        self.compiled, self.rows, self.waiting, self.component = compiled, rows, waiting, component
        prompts = PromptCache(prompt_cache) if prompt_cache else None
        if prompts is not None:
            compiled.prompt_caches[id(prompts)] = prompts
        self._batch = RunningBatch(compiled, rows, chunk, prompts, component)
        self._changed, self._closing, self._numbers = threading.Condition(), False, itertools.count()
        self._draining = False
        self._queue: collections.OrderedDict[int, RunningRow] = collections.OrderedDict()
        self._last_request: dict[str, float] = {}
        self._thread = threading.Thread(target=self._work, name="lorac-scheduler", daemon=True)
        self._thread.start()
        atexit.register(self.close)  # the interpreter aborts where it ends below a thread that computes

    def submit(self, request: TextRequest) -> TokenStream:
        """Put a request in line; return its tokens as they are computed.

        Raises:
            AdapterNotFound, ChoiceError: as for ``compiled.swap``.
            InputMismatch, OptionError: as for ``compiled.generate``; or more come at once than may ever wait.
            OverBudget: as many requests of the tenant wait as may (code ``queue_full``); or it drains (``stopping``).
            Unavailable: the options ask for beams, drafts or several sequences; or the scheduler is closed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[TextRequest]) -> list[TokenStream]:
        """Put several requests in line, all or none; raises as ``submit``."""
        counts = collections.Counter(request.tenant for request in requests)
        for count in counts.values():
            if count > self.waiting:
                raise InputMismatch(
                    f"{count} requests come at once, and at most {self.waiting} may wait",
                    next_step="submit fewer at once",
                )
        self._check_room(counts)  # first, so that requests without room cost nothing
        rows = [RunningRow(self.compiled, request, self.component) for request in requests]
        with self._changed:
            self._check_room(counts)
            self._last_request.update(dict.fromkeys(counts, time.monotonic()))
            self._queue.update((next(self._numbers), row) for row in rows)
            self._changed.notify()
        if self.compiled.switch.mode == "live":
            for row in rows:
                self.compiled.switch.prefetch(row.choice)
        return [row.stream for row in rows]

    def _check_room(self, counts: Mapping[str, int]) -> None:
        """Check that so many requests of each tenant may be put in line."""
        with self._changed:
            if self._draining:
                raise _stopping()
            if self._closing:
                raise Unavailable("the scheduler is closed", next_step="submit to another lorac.Scheduler(compiled)")
            self._drop_interrupted()
            line = [row.request.tenant for row in self._queue.values()]
            for tenant, count in counts.items():
                check_line(line, tenant, count, self.waiting)
                line += [tenant] * count

    @property
    def load(self) -> tuple[int, int]:
        """The number of requests at work, and of those that wait."""
        return len(self._batch.rows), len(self._queue)

    @property
    def chunk(self) -> int | None:
        """The most tokens of each prompt per step; None until that is chosen."""
        return self._batch.chunk

    @property
    def works(self) -> bool:
        """Whether requests are answered: its thread runs."""
        return self._thread.is_alive()

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes that rows at work take: of "bank", which holds their adapters, and of "kv", keys and values."""
        return self._batch.nbytes

    def drain(self, *, running: bool = False) -> None:
        """Take no more requests, and end those that wait by an error (code ``stopping``); those at work go on.

        Args:
            running: end those at work, too, by their deadline.
        """
        with self._changed:
            self._closing = self._draining = True
            for row in self._queue.values():
                row.end("error", _stopping())
            self._queue.clear()
            for row in self._batch.rows if running else ():
                row.stream.expire()
            self._changed.notify()

    def close(self) -> None:
        """Take no more requests; return when those that were submitted have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        with torch.no_grad():
            self._batch.choose_chunk()
            while self._fill():
                self._batch.step()

    def _fill(self) -> bool:
        """Let requests begin while there is room; wait for one if there is no work. Return False at the end."""
        with self._changed:
            while not (self._queue or self._batch.rows or self._closing):
                self._changed.wait()
            self._drop_interrupted()
            oldest = time.monotonic() - _RECENT
            self._last_request = {tenant: last for tenant, last in self._last_request.items() if last > oldest}
            while self._queue and (free := self.rows - len(self._batch.rows)) > 0:
                at_work = collections.Counter(row.request.tenant for row in self._batch.rows)
                waiting = [(at_work[row.request.tenant], number) for number, row in self._queue.items()]
                rows, number = min(waiting)
                if self._keeps_row(at_work.keys(), rows, free) or not self._begin(number):
                    break
            self._batch.is_shared = len(self._last_request.keys() | {r.request.tenant for r in self._batch.rows}) > 1
            return bool(self._queue or self._batch.rows or not self._closing)

    def _keeps_row(self, at_work: Set[str], rows: int, free: int) -> bool:
        """Return whether the next free row is kept for tenants that sent a request within the last minute.

        Args:
            at_work: the tenants that have rows.
            rows: the fewest that a tenant has whose request waits.
            free: the number of free rows.
        """
        recent = self._last_request.keys()
        has_share = rows >= self.rows // 2 and len(recent | at_work) > 1
        return (
            self.rows >= _SHARED and not self._closing and (has_share or bool(rows and free == 1 and recent - at_work))
        )

    def _begin(self, number: int) -> bool:
        """Begin a request and return True, or leave it in line until others have freed memory."""
        row = self._queue[number]
        try:
            self._batch.admit(row)
        except Exception as error:
            if isinstance(error, OverBudget) and not error.permanent and self._batch.rows:
                return False
            row.end("error", error)
        del self._queue[number]
        return True

    def _drop_interrupted(self) -> None:
        for number, row in list(self._queue.items()):
            if row.stream.interrupted:
                row.end(row.stream.interrupted)
                del self._queue[number]


def _stopping() -> OverBudget:
    text = "the server is stopping, and takes no more requests"
    return OverBudget(text, next_step="send the request again, and another one answers it", code="stopping")
