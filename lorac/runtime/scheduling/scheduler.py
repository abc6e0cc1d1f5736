"""The scheduler of continuous batching: requests of many tenants, each with its adapters, share each step."""

from __future__ import annotations

import atexit
import collections
import contextlib
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from lorac.argument_types import check_type
from lorac.errors import InputMismatch, OverBudget, Unavailable
from lorac.frontend.components import MAIN_GRAPH
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.runtime.openmp import on_one_thread
from lorac.runtime.scheduling.running_batch import RunningBatch
from lorac.runtime.scheduling.running_row import RunningRow
from lorac.runtime.scheduling.token_stream import TextRequest, TokenStream

if TYPE_CHECKING:
    from lorac.runtime.generation.generate import GeneratingModel

_SHARED, _RECENT = 4, 60.0
"""The least number of rows at which rows are reserved for other tenants; the seconds for which a request counts."""


class Scheduler(contextlib.AbstractContextManager["Scheduler"]):
    """A thread in which a compiled model answers many requests at once.

    A step computes one token for every generating row and a chunk of each prompt, in one engine call for all adapters
    that can share it. The next free row goes to the tenant with the fewest rows, and among those to the request that
    has waited longest. With four rows or more, while other tenants sent a request within the last minute, a tenant gets
    at most half of the rows, and one row is reserved for tenants without any. While several tenants have rows, a step
    reads one chunk for each tenant. A request begins when there is a row and memory for it (``compiled.memory``).
    Adapters may be added, removed and swapped meanwhile; a request keeps the adapters that it began with.

    Args:
        compiled: a model compiled with ``cache=True``.
        rows: the most requests that run at once.
        waiting: the most requests that wait; a full line still takes a tenant up to its share of the line.
        chunk: the most tokens of each prompt per step. With a larger chunk, prompts are read sooner, and the tokens of
            running requests come later. Default: the largest with which a step of half the rows takes 1.5 times as
            long, but at least 4; up to 64 while only one tenant sends requests and more of its rows read prompts than
            generate (256 for all prompts together). The model is timed once, before the first request begins.
        prompt_cache: bytes of keys and values to cache for prompts with the same first tokens; 0 caches nothing.
        component: the name of the model that decodes, where there are several.

    Raises:
        Unavailable: the program has no cache, or is an encoder-decoder.
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
        atexit.register(self.close)  # the interpreter aborts where it exits while a thread computes

    def submit(self, request: TextRequest) -> TokenStream:
        """Put a request in line; return the stream of its tokens.

        Raises:
            AdapterNotFound, ChoiceError: as for ``compiled.swap``.
            InputMismatch, OptionError: as for ``compiled.generate``; or more requests come at once than may wait.
            OverBudget: the tenant's share of the line is full (code ``queue_full``), or
                the scheduler drains (``stopping``).
            Unavailable: the options ask for beams, drafts or several sequences; or the scheduler is closed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[TextRequest]) -> list[TokenStream]:
        """Put several requests in line, all or none of them; raises as ``submit``."""
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
        """Check that the line takes this number of further requests of each tenant."""
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
        """The number of running requests, and the number of waiting requests."""
        return len(self._batch.rows), len(self._queue)

    @property
    def chunk(self) -> int | None:
        """The most tokens of each prompt per step; None until the model was timed."""
        return self._batch.chunk

    @property
    def works(self) -> bool:
        """Whether the scheduler's thread runs and answers requests."""
        return self._thread.is_alive()

    @property
    def nbytes(self) -> dict[str, int]:
        """The bytes that running rows take: "bank" for their adapters, "kv" for keys and values."""
        return self._batch.nbytes

    def drain(self, *, running: bool = False) -> None:
        """Take no more requests, and end waiting requests with an error (code ``stopping``); running requests go on.

        Args:
            running: also end running requests, with the reason "deadline".
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
        """Take no more requests; return when all submitted requests have ended."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        atexit.unregister(self.close)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _work(self) -> None:
        with torch.no_grad(), on_one_thread():
            self._batch.choose_chunk()
            while self._fill():
                self._batch.step()

    def _fill(self) -> bool:
        """Begin requests while there is room; wait for a request if there is no work. Return False once closed."""
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
                # The last rows are reserved for tenants that sent a request within the last minute.
                recent = self._last_request.keys()
                has_share = rows >= self.rows // 2 and len(recent | at_work.keys()) > 1
                awaits = bool(rows and free == 1 and recent - at_work.keys())
                reserved = self.rows >= _SHARED and not self._closing and (has_share or awaits)
                if reserved or not self._begin(number):
                    break
            self._batch.is_shared = len(self._last_request.keys() | {r.request.tenant for r in self._batch.rows}) > 1
            return bool(self._queue or self._batch.rows or not self._closing)

    def _begin(self, number: int) -> bool:
        """Begin a request and return True; return False and leave it in line where memory must be freed first."""
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


def check_line(line: Sequence[str], tenant: str, count: int, most: int) -> None:
    """Check that a line has room for ``count`` more requests of a tenant.

    All tenants with waiting requests have equal shares of the line. A full line still takes a tenant up to its share,
    and is then longer than ``most``: one tenant's requests never keep another tenant's out.

    Args:
        line: the tenant of each waiting request.
        tenant: the tenant that sends the requests.
        count: the number of requests.
        most: the most requests that may wait.

    Raises:
        OverBudget: there is no room (code ``queue_full``).
    """
    own, share = line.count(tenant), -(-most // len({*line, tenant}))
    if len(line) + count > most and own + count > share:
        raise OverBudget(
            f"{own} requests of the tenant wait, {count} more would, and its share of {most} places in line is {share}",
            next_step="submit it again when one of them has begun",
            code="queue_full",
        )
