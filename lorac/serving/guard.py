"""Who may ask, and how much: checked before the app reads a request."""

import hashlib
import hmac
from collections.abc import Mapping
from typing import final

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorac.serving.refusals import refusal
from lorac.serving.settings import ServingSettings

UPLOADS = "/v1/adapters"
"""The path to which adapters are uploaded."""
OPEN_PATHS = frozenset({"/", "/health"})
"""Paths that need no key: a load balancer asks after health, and the page asks its reader for the key."""
NOBODY = "default"
"""The tenant of requests without a key."""


@final
class Guard:
    """Lets requests with a known key and a body of admitted size through to an app.

    It is not one of Starlette's HTTP middlewares, behind which an app does not learn that a client has left.

    Args:
        app: the app behind it.
        settings: the keys, and the most bytes.
    """

    def __init__(self, app: ASGIApp, settings: ServingSettings) -> None:
        self._app, self._settings = app, settings
        self._tenants = {_digest(key): tenant for key, tenant in settings.keys.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        most = self._settings.max_upload_bytes if scope["path"] == UPLOADS else self._settings.max_body_bytes
        tenant = self._check(headers, scope["path"], most)
        if isinstance(tenant, JSONResponse):
            await tenant(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        body = _CountedBody(receive, send, most)
        try:
            await self._app(scope, body.receive, body.send)
        except _BodyTooLarge:
            await _too_large(most)(scope, receive, send)

    def _check(self, headers: Mapping[bytes, str], path: str, most: int) -> str | JSONResponse:
        """Return who asks, or the refusal. Every key is compared, in constant time."""
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        given = _digest(key.strip())
        found = [tenant for known, tenant in self._tenants.items() if hmac.compare_digest(known, given)]
        is_known = bool(found) and scheme.lower() == "bearer"
        if not is_known and self._tenants and path not in OPEN_PATHS:
            return refusal(401, "the API key is missing or unknown; send it as Authorization: Bearer KEY")
        length = headers.get(b"content-length", "0")
        if not length.isdecimal() or int(length) > most:
            return _too_large(most)
        return found[0] if is_known else NOBODY


@final
class _CountedBody:
    """Counts the bytes of a request's body as they come, whatever its headers say.

    Args:
        receive: gives the messages of the request.
        send: takes those of the answer.
        most: the most bytes.
    """

    def __init__(self, receive: Receive, send: Send, most: int) -> None:
        self._receive, self._send, self._most = receive, send, most
        self._read, self._begun = 0, False

    async def receive(self) -> Message:
        message = await self._receive()
        self._read += len(message.get("body", b""))
        if self._read > self._most and not self._begun:
            raise _BodyTooLarge
        return message

    async def send(self, message: Message) -> None:
        self._begun = True
        await self._send(message)


class _BodyTooLarge(BaseException):
    """A body is larger than it may be. No handler of the app's may answer it."""


def _too_large(most: int) -> JSONResponse:
    return refusal(413, f"a request has at most {most} bytes", headers={"connection": "close"})


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
