"""One line of JSON for each request."""

import json
import logging
import time
from typing import final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorac.serving.answers.connection import CLIENT_LEFT

LOGGER = logging.getLogger("lorac.serving")


@final
class RequestLog:
    """Logs the requests to an app. JSON escapes whatever names and paths hold.

    Args:
        app: answers them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not LOGGER.isEnabledFor(logging.INFO):
            await self._app(scope, receive, send)
            return
        status, begun = CLIENT_LEFT, time.monotonic()

        async def note_status(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        except Exception:
            status = 500  # it is sent behind this
            raise
        finally:
            LOGGER.info(json.dumps(_describe(scope, status, time.monotonic() - begun)))


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
