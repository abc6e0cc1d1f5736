"""A replica that computes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import TypeAlias

from ray import serve
from ray.util import metrics

import lorac
from lorac.errors import LoracError
from lorac.frontend.components import MAIN_GRAPH
from lorac.runtime.scheduling.scheduler import Scheduler
from lorac.runtime.scheduling.token_stream import TextRequest, TextToken, TokenStream
from lorac.serving.ray.remote_model import RemoteAdapters, RemoteModel
from lorac.serving.settings import ServingSettings

Event: TypeAlias = "TextToken | str | LoracError | None"
"""What a worker answers with: None when it has taken a request, its tokens, and why it ended or cannot go on."""


class Worker:
    """Holds the compiled model, and computes text.

    Args:
        folder: the compiled model.
        settings: of the server.
        adapters: how many choices of adapters it is kept to.
    """

    def __init__(self, folder: str, settings: ServingSettings, adapters: int) -> None:
        self._compiled = lorac.load(folder)
        self._scheduler = Scheduler(self._compiled, settings.rows, settings.waiting, settings.chunk)
        self._held = contextlib.ExitStack()
        for name in settings.pinned:
            self._held.enter_context(self._compiled.hold(name))

        async def name_choice(name: str) -> str:  # the engine itself keeps adapters; Ray only learns who is where
            return name

        self._claim = serve.multiplexed(max_num_models_per_replica=adapters)(name_choice)
        self._gauges = {
            name: metrics.Gauge(f"lorac_{name}", description=text)
            for name, text in {
                "requests_running": "Requests at work in a worker.",
                "requests_waiting": "Requests that wait in a worker.",
                "memory_bytes": "Memory of adapters, keys and values in a worker.",
            }.items()
        }

    def describe(self) -> RemoteModel:
        """Return what a front must know of the model."""
        return RemoteModel(
            tokenizer=self._compiled.tokenizer,
            traits={**self._compiled.traits},
            spec=self._compiled.engine.cache_spec(MAIN_GRAPH),
            pool=RemoteAdapters(self._compiled.pool),
        )

    async def answer(self, request: TextRequest) -> AsyncIterator[Event]:
        """Yield what comes of a request."""
        await self._claim(serve.get_multiplexed_model_id())
        try:
            stream = await asyncio.to_thread(self._scheduler.submit, request)
        except LoracError as error:
            yield error
            return
        yield None
        async with contextlib.aclosing(aiter(stream)) as tokens:
            async for event in _read(tokens, stream):
                yield event

    def check_health(self) -> None:
        """Report the load; Ray asks every two seconds."""
        running, waiting = self._scheduler.load
        memory = self._compiled.memory.used
        for name, value in {"requests_running": running, "requests_waiting": waiting, "memory_bytes": memory}.items():
            self._gauges[name].set(value)

    def __del__(self) -> None:
        self._scheduler.close()
        self._held.close()


async def _read(tokens: AsyncIterator[TextToken], stream: TokenStream) -> AsyncIterator[Event]:
    """Yield the tokens of a request, and why it ended or cannot go on."""
    try:
        async for token in tokens:
            yield token
        yield stream.reason
    except LoracError as error:
        yield error
