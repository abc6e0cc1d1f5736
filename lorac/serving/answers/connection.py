"""Answers in JSON and in events, and work that is cancelled when its client disconnects."""

import asyncio
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from typing import TypeVar, final

from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
CLIENT_LEFT = 499
"""The status that the log has for a request whose client disconnected, as in nginx."""


async def run_while_connected(work: Awaitable[T], receive: Receive) -> T | None:
    """Await some work and return its result; cancel it and return None if the client disconnects first.

    Args:
        receive: ASGI's ``receive`` of a request whose body has been read.
    """

    async def wait_for_disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, left = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_disconnect())
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, left):
            each.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


@final
class EventStream(StreamingResponse):
    """A response of server-sent events, which is cancelled when the client disconnects, even before the first event.

    Args:
        events: the events, as ``format_event`` returns them.
    """

    def __init__(self, events: AsyncGenerator[str]) -> None:
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}  # proxies must not buffer events
        super().__init__(events, headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await run_while_connected(self.stream_response(send), receive)


def format_event(data: str) -> str:
    """Return data in the form of a server-sent event."""
    return f"data: {data}\n\n"


async def merge_streams(streams: Sequence[AsyncIterator[T]]) -> AsyncGenerator[T]:
    """Yield the items of several streams as they come; if one raises, or the generator is closed, cancel all."""
    items: asyncio.Queue[tuple[T] | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncIterator[T]) -> None:
        try:
            async for item in stream:
                items.put_nowait((item,))
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]  # a task group must not enclose a yield
    going = len(tasks)
    try:
        while going:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                going -= 1
            else:
                yield item[0]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@final
class JsonAnswer(JSONResponse):
    """A JSON response, encoded piece by piece in Python so that other threads can run in between.

    The encoder in C would hold the interpreter lock, and so block the event loop, until the whole text is encoded.
    """

    def render(self, content: object) -> bytes:
        written = io.StringIO()
        encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        written.writelines(encoder.iterencode(content))
        return written.getvalue().encode()
