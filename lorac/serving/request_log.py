"""The log of requests: one line of JSON for each."""

import json
import logging
import re
import time
import uuid
from typing import final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorac.serving.answers.connection import CLIENT_LEFT
from lorac.serving.metrics import ServerMetrics

LOGGER = logging.getLogger("lorac.serving")
_ID = re.compile(rb"[!-~]{1,128}")
_PROBED, _FAILED = ("/health", "/ready", "/metrics"), 400


@final
class RequestLog:
    """ASGI middleware that logs and counts requests. JSON escapes control characters in names and paths.

    A response has the ``x-request-id`` of its request, or a new one. Successful probes are not logged.

    Args:
        app: answers the requests.
        metrics: counts the responses.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = CLIENT_LEFT, time.monotonic()
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        number = given if _ID.fullmatch(given) else uuid.uuid4().hex.encode()

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", number)]}
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        except Exception:
            status = 500  # a middleware outside sends it
            raise
        finally:
            self._metrics.count_response(status)
            if LOGGER.isEnabledFor(logging.INFO) and (scope["path"] not in _PROBED or status >= _FAILED):
                line = _describe(scope, status, time.monotonic() - begun)
                LOGGER.info(json.dumps({**line, "request_id": number.decode()}))


def _describe(scope: Scope, status: int, seconds: float) -> dict[str, object]:
    state = scope.get("state", {})
    text = state.get("text")
    return {
        "time": time.time(),
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 6),
        "tenant": state.get("tenant"),
        **({} if text is None else text.log_fields),
    }
