"""Requests that workers compute; a request moves to another worker if its worker dies."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import secrets
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import final

import torch
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from lorac.errors import LoracError, OverBudget
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.slots.choice import describe_choice, parse_choice
from lorac.runtime.scheduling.token_stream import TextRequest, TokenStream
from lorac.serving.ray.remote_model import Event, RemoteModel, SharedFile
from lorac.serving.ray.worker_calls import MOST_MOVES, WORKER_ENDED, all_full, moved_too_often

PAUSE = 0.2
"""Seconds between checks whether a client has disconnected, and before a full cluster is tried again."""


@final
class RemoteScheduler:
    """A scheduler whose requests are computed by workers.

    Args:
        compiled: the model.
        workers: the handle of the workers.
        rows: the most running requests, over all workers.
        loop: runs the requests' tasks.
    """

    component = MAIN_GRAPH
    chunk = None
    nbytes: Mapping[str, int] = MappingProxyType({})

    def __init__(
        self, compiled: RemoteModel, workers: DeploymentHandle, rows: int, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.compiled, self.rows, self._workers, self._loop = compiled, rows, workers, loop
        self._requests: dict[RemoteRequest, asyncio.Task[None]] = {}

    def submit_all(self, requests: Sequence[TextRequest]) -> list[TokenStream]:
        """Submit several requests to workers: all of them, or none. The event loop's own thread must not call it.

        Raises:
            LoracError: as ``Scheduler.submit_all``.
        """
        return asyncio.run_coroutine_threadsafe(self._submit(requests), self._loop).result()

    async def _submit(self, requests: Sequence[TextRequest]) -> list[TokenStream]:
        pool = self.compiled.pool
        submitted = [
            RemoteRequest(request, self._name(request), pool.find_files([request.adapters]), self._workers)
            for request in requests
        ]
        begun = await asyncio.gather(*(each.begin() for each in submitted), return_exceptions=True)
        refused = [error for error in begun if isinstance(error, BaseException)]
        if refused:
            for each in submitted:
                each.leave()
            raise refused[0]
        for each in submitted:
            self._requests[each] = task = asyncio.create_task(each.follow())
            task.add_done_callback(functools.partial(self._requests.pop, each))
        return [each.stream for each in submitted]

    def _name(self, request: TextRequest) -> str:
        return describe_choice(parse_choice(request.adapters, self.compiled.pool))

    @property
    def load(self) -> tuple[int, int]:
        """The number of requests that have a token, and the number that wait for their first."""
        running = sum(each.running for each in self._requests)
        return running, len(self._requests) - running

    @property
    def works(self) -> bool:
        """Whether Ray's controller reports a running worker. The call blocks, so no event loop may make it."""
        application = serve.status().applications.get(self._workers.app_name)
        if application is None:
            return False
        return bool(application.deployments[self._workers.deployment_name].replica_states.get("RUNNING"))

    def close(self) -> None:
        """Wait until all submitted requests have ended."""

        async def drain() -> None:
            await asyncio.gather(*self._requests.values(), return_exceptions=True)

        asyncio.run_coroutine_threadsafe(drain(), self._loop).result()


class _ClientLeft(Exception):
    """The client has disconnected, or the request's deadline has passed."""


@final
class RemoteRequest:
    """A request at a worker; if the worker dies, the request moves to another.

    Args:
        request: the prompt and its options.
        name: the name of its choice of adapters, by which Ray routes it.
        files: name -> file of its adapters that were added while the server runs.
        workers: the handle of the workers.

    Attributes:
        stream: the tokens, as the app reads them.
    """

    def __init__(
        self, request: TextRequest, name: str, files: Mapping[str, SharedFile], workers: DeploymentHandle
    ) -> None:
        # Another worker can continue the draws only if it knows the seed.
        self._request = dataclasses.replace(
            request, seed=secrets.randbits(63) if request.seed is None else request.seed
        )
        self._files = files
        self._worker = workers.options(stream=True, multiplexed_model_id=name)
        self.stream = TokenStream(request.deadline)
        self._drawn, self._moves = list[int](), 0

    async def begin(self) -> None:
        """Submit the request to a worker.

        Raises:
            LoracError: the worker refuses the request, or no worker has room.
        """
        while True:
            try:
                return await self._ask()
            except WORKER_ENDED as error:
                self._count_move(error)

    async def follow(self) -> None:
        """Forward the workers' tokens to the stream until the request ends."""
        try:
            while True:
                try:
                    self.stream.end(await self._read())
                    return
                except WORKER_ENDED as error:
                    self._count_move(error)
                await self._move()
        except _ClientLeft:
            self.leave()
            self.stream.end(self.stream.interrupted)
        except Exception as error:  # the reader's loop raises it
            self.stream.end("error", error)

    def leave(self) -> None:
        """Cancel the request at its worker."""
        with contextlib.suppress(BackPressureError):  # Ray raises the refusal of the call
            self._answer.cancel()

    async def _read(self) -> str:
        """Forward one worker's tokens to the stream; return the finish reason."""
        while not isinstance(event := await self._next(), str):
            if isinstance(event, LoracError):
                raise event
            if event is not None:
                self._drawn.append(event.id)
                self.stream.put(event)
        return event

    async def _move(self) -> None:
        """Submit the request to another worker, as soon as one has room."""
        while True:
            with contextlib.suppress(OverBudget):
                return await self.begin()
            await asyncio.sleep(PAUSE)
            self._check_reader()

    def _count_move(self, error: Exception) -> None:
        self._moves += 1
        if self._moves > MOST_MOVES:
            raise moved_too_often() from error

    async def _ask(self) -> None:
        request = self._request
        if self._drawn:
            ids = torch.cat([request.ids, torch.tensor(self._drawn)])
            request = dataclasses.replace(request, ids=ids, drawn=len(self._drawn))
        self._answer: DeploymentResponseGenerator[Event] = self._worker.answer.remote(request, self._files)
        self._events = aiter(self._answer)
        try:
            taken = await self._next()
        except BackPressureError as error:
            raise all_full() from error
        if isinstance(taken, LoracError):
            raise taken

    @property
    def running(self) -> bool:
        """Whether a token has come."""
        return bool(self._drawn)

    async def _next(self) -> Event:
        coming = asyncio.ensure_future(anext(self._events))
        while not (await asyncio.wait({coming}, timeout=PAUSE))[0]:
            if self.stream.interrupted:
                coming.cancel()
            self._check_reader()
        self._check_reader()
        return await coming

    def _check_reader(self) -> None:
        if self.stream.interrupted:
            raise _ClientLeft
