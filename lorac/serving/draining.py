"""The end of a server: new requests are refused, and running requests are finished."""

import time
from types import FrameType
from typing import final

import fastapi
import uvicorn
from fastapi.concurrency import run_in_threadpool

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
