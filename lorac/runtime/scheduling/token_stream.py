"""Requests for text, and the streams of tokens that answer them."""

import asyncio
import collections
import queue
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lorac.ir.slots.choice import UNSET, ChoiceSpec


@dataclass(frozen=True, eq=False)
class TextRequest:
    """A prompt to continue.

    Attributes:
        ids: the prompt's token ids (length,).
        adapters: the choice of adapters, as ``compiled.swap`` takes it; default: the active choice.
        seed: the seed of random numbers, as for ``compiled.generate``; None: torch's own generator draws it.
        logprobs: the number of likeliest tokens to report with each token; None: no log-probabilities.
        tenant: the name of the client. Tenants share the rows; cached prompts are never shared between tenants.
        deadline: seconds from submission after which the request ends; None: never.
        drawn: the number of last ids that were drawn elsewhere, with the same seed and options; the answer continues
            as if it had not been interrupted.
        options: options of ``compiled.generate`` (``max_new_tokens``, ``do_sample``, ``temperature``, …), and images or
            sounds in the prompt, as the model's processor makes them (``pixel_values``, …).
    """

    ids: Tensor
    adapters: ChoiceSpec = UNSET
    seed: int | None = None
    logprobs: int | None = None
    tenant: str = ""
    deadline: float | None = None
    drawn: int = 0
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class TextToken:
    """A token of an answer.

    Attributes:
        id: the token.
        logprob: the model's log-probability of the token, before any option changes the scores; None unless requested.
        likeliest: the likeliest tokens with their log-probabilities, in descending order.
    """

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class TokenStream:
    """The tokens of one request as they are computed, for ``async for`` or, in a thread, ``for``.

    Leaving the loop cancels the request. Only one loop may read a stream.

    Args:
        deadline: seconds after which the request ends; None: never.

    Attributes:
        reason: why the request ended: "stop", "length", "cancelled", "deadline" or "error"; empty before.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.reason = ""
        self._ends_at = None if deadline is None else time.monotonic() + deadline
        self._items: queue.SimpleQueue[TextToken | BaseException | None] = queue.SimpleQueue()
        self._reader: tuple[asyncio.AbstractEventLoop, asyncio.Event] | None = None
        self._cancelled = False

    def cancel(self) -> None:
        """Cancel the request; its row is freed after the current step."""
        self._cancelled = True

    def __iter__(self) -> Iterator[TextToken]:
        try:
            while (token := self._next()) is not None:
                yield token
        finally:
            self._leave()

    async def __aiter__(self) -> AsyncGenerator[TextToken]:
        ready = asyncio.Event()
        self._reader = asyncio.get_running_loop(), ready
        try:
            while True:
                ready.clear()
                if self._items.empty():
                    await ready.wait()
                if (token := self._next()) is None:
                    break
                yield token
        finally:
            self._reader = None
            self._leave()

    def _next(self) -> TextToken | None:
        item = self._items.get()
        if not isinstance(item, BaseException):
            return item
        try:
            raise item
        finally:
            del item  # the error's traceback references this frame

    def _leave(self) -> None:
        """Cancel the request, and end any later loop over the stream."""
        self.cancel()
        self._items.put(None)

    # ── The scheduler's side ─────────────────────────────────────────────────────────────────────────────────────────
    @property
    def interrupted(self) -> str:
        """Why the request must end early: "cancelled" or "deadline"; empty if it goes on."""
        if self._cancelled:
            return "cancelled"
        return "deadline" if self._ends_at is not None and time.monotonic() > self._ends_at else ""

    def expire(self) -> None:
        """Set the request's deadline to now."""
        self._ends_at = 0.0

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """End the stream; the reader's loop ends, or raises the error."""
        self.reason = reason
        self.put(error)

    def put(self, item: TextToken | BaseException | None) -> None:
        """Queue a token, an error, or None for the end, and wake the reader."""
        self.add(item)
        wake_readers([self])

    def add(self, item: TextToken | BaseException | None) -> None:
        """Queue an item; ``wake_readers`` must be called to wake a reader in an event loop."""
        self._items.put(item)


def wake_readers(streams: Iterable[TokenStream]) -> None:
    """Wake the event-loop readers of streams that have new items, with one call per event loop."""
    readers = collections.defaultdict[asyncio.AbstractEventLoop, dict[TokenStream, asyncio.Event]](dict)
    for stream in streams:
        if (reader := stream._reader) is not None:
            readers[reader[0]][stream] = reader[1]

    def set_all(events: Iterable[asyncio.Event]) -> None:
        for event in events:
            event.set()

    for loop, found in readers.items():
        try:
            loop.call_soon_threadsafe(set_all, found.values())
        except RuntimeError:  # the event loop was closed
            for stream in found:
                stream.cancel()
