"""The end of a server, whose running requests are finished, and the limits on its connections."""

import time
from types import FrameType
from typing import final

import fastapi
import uvicorn
from fastapi.concurrency import run_in_threadpool
from uvicorn.protocols.http.h11_impl import H11Protocol

_FLUSHING = 10
"""Seconds to send the last events of requests that were cut off."""


@final
class DrainingServer(uvicorn.Server):
    """A server that drains at the first stop signal, and exits when its requests have ended or ``grace`` is over.

    Until then it refuses new requests, since load balancers notice late that it stops. A second signal makes it exit.

    Args:
        config: uvicorn's configuration.
        app: the app to serve; its state says whether it drains.
        grace: the most seconds for running requests.
    """

    def __init__(self, config: uvicorn.Config, app: fastapi.FastAPI, grace: float) -> None:
        config.timeout_graceful_shutdown = _FLUSHING
        super().__init__(config)
        self._state, self._grace = app.state, grace
        self._ends: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or exit if draining has begun."""
        if self._ends is None:
            self._ends = time.monotonic() + self._grace
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Drain if a signal has come, and return whether the server exits; uvicorn calls it ten times a second."""
        state, ends = self._state, self._ends
        if ends is not None:
            is_late = time.monotonic() > ends
            if state.scheduler is not None and (is_late or not state.draining):
                await run_in_threadpool(state.scheduler.drain, running=is_late)
            state.draining = True
            self.should_exit |= is_late or not self.server_state.tasks
        return await super().on_tick(counter)


def limit_connections(server: uvicorn.Server, seconds: float, most: int) -> None:
    """Close connections that wait too long for a request, and the longest waiting if there are more than ``most``.

    uvicorn itself sets no limit on the time of a request's headers, and does not document how to find its connections.
    They are read from ``Server.server_state.connections``, with the attributes of h11's connections ``cycle`` (the
    current or the last request) and ``transport``.

    Args:
        seconds: the longest time without a request, before the first and between requests.
        most: the most connections.
    """
    waiting: dict[H11Protocol, tuple[object, float]] = {}

    async def sweep() -> None:
        nonlocal waiting
        now, found = time.monotonic(), dict[H11Protocol, tuple[object, float]]()
        connections = [one for one in server.server_state.connections if isinstance(one, H11Protocol)]
        for connection in connections:
            cycle = connection.cycle
            if not cycle or cycle.response_complete:
                known = waiting.get(connection)
                found[connection] = known if known is not None and known[0] is cycle else (cycle, now)
        excess = len(connections) - most
        for place, connection in enumerate(sorted(found, key=lambda one: found[one][1])):
            if place < excess or now - found[connection][1] > seconds:
                connection.transport.close()
        waiting = found

    server.config.callback_notify, server.config.timeout_notify = sweep, 0
