"""Checks of a request's key, size and tenant, before the app reads the request."""

import asyncio
import collections
import functools
import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import final

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorac.errors import LoracError
from lorac.serving.refusals import refusal, refuse
from lorac.serving.settings import ServingSettings
from lorac.serving.store import AdapterStore

UPLOADS = "/v1/adapters"
"""The path to which adapters are uploaded."""
CHATS = frozenset({"/v1/chat/completions", "/tokenize"})
"""Paths that take conversations, which may contain images."""
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
"""Paths that need no key: load balancers check the health, and the page asks its user for the key."""
NOBODY = "default"
"""The tenant of requests without a key."""
_LEAST_RATE = 1 << 16
"""The least rate of a body, in bytes per second."""
_FAILED, _REFUSALS = 400, 25
"""The least status of a refusal; the number of refusals that a tenant gets undelayed, and then gets per second."""
_CLOSE = {"connection": "close"}
_STOPPING = "the server is stopping; send the request again, and another one answers it"


@final
class Guard:
    """ASGI middleware that admits requests by their key, body size and number per tenant.

    While the app drains (``state.draining``), only requests for its state are admitted. A body that comes too slowly
    is refused. Room for the bytes of uploads and images is reserved before they are received. The refusals of a tenant
    that gets many are delayed, since immediate retries take the event loop's time from other tenants.

    It is not one of Starlette's HTTP middlewares, which hide from the app that a client has disconnected.

    Args:
        app: the app that gets the admitted requests.
        settings: the keys and limits.
        store: checks the quotas of uploads; None: the app takes no uploads.
        images: the most bytes that the images of a conversation take in its body, in base64.
    """

    def __init__(
        self, app: ASGIApp, settings: ServingSettings, store: AdapterStore | None = None, images: int = 0
    ) -> None:
        self._app, self._settings, self._store, self._image_bytes = app, settings, store, images
        self._tenants = {_digest(key): tenant for key, tenant in settings.keys.items()}
        self._running, self._receiving = Counter[str](), Counter[str]()
        self._last_refusal = collections.defaultdict[str, float](float)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        uploads = scope["path"] == UPLOADS and scope["method"] == "POST"
        images = self._image_bytes if scope["path"] in CHATS else 0
        most = self._settings.max_upload_bytes if uploads else self._settings.max_body_bytes + images
        tenant = self._check(headers, scope["path"], most)
        if isinstance(tenant, str) and scope["app"].state.draining and scope["path"] not in {*OPEN_PATHS, "/metrics"}:
            tenant = refusal(503, _STOPPING, code="stopping", headers=_CLOSE)
        if isinstance(tenant, JSONResponse):
            await tenant(scope, receive, send)
            return
        scope.setdefault("state", {})["tenant"] = tenant
        counts = scope["path"] not in OPEN_PATHS
        if counts and self._running[tenant] >= -(-self._settings.max_connections // 2):
            half = refusal(429, "this tenant has half of the requests that the server answers at once", headers=_CLOSE)
            await half(scope, receive, send)
            return

        async def pace(message: Message) -> None:
            if counts and message.get("status", 0) >= _FAILED:
                now = time.monotonic()
                self._last_refusal[tenant] = due = max(now - 1, self._last_refusal[tenant] + 1 / _REFUSALS)
                await asyncio.sleep(due - now)
            await send(message)

        body = _Body(receive, pace, most, self._settings.body_timeout)
        self._running[tenant] += counts
        try:
            if uploads or images:
                body.claim = functools.partial(self._claim, tenant, self._store if uploads else None)
                body.announce(int(headers.get(b"content-length", "0")))
            await self._app(scope, body.receive, body.send)
        except _Refused as refused:
            await refused.answer(scope, receive, pace)
        finally:
            self._running[tenant] -= counts
            self._receiving[tenant] -= body.claimed

    def _claim(self, tenant: str, store: AdapterStore | None, nbytes: int) -> None:
        """Reserve room for more bytes of a tenant's uploads and images; a tenant has at most half of the room."""
        own, most = self._receiving[tenant] + nbytes, self._settings.max_spool_bytes
        try:
            if store is not None:
                store.check_upload(tenant, own)
        except LoracError as error:
            raise _Refused(refuse(error)) from error
        if own > most // 2 or self._receiving.total() + nbytes > most:
            raise _Refused(
                refusal(429, f"{self._receiving.total()} bytes of uploads are arriving, and there is no room for more")
            )
        self._receiving[tenant] = own

    def _check(self, headers: Mapping[bytes, str], path: str, most: int) -> str | JSONResponse:
        """Return the tenant of a request, or its refusal. Every key is compared, in constant time."""
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
class _Body:
    """The body of a request as it comes: bytes are counted, whatever the headers announce, and time is limited.

    Args:
        receive: ASGI's ``receive`` of the request.
        send: ASGI's ``send`` of the answer.
        most: the most bytes.
        seconds: the time for the whole body, plus the time of its bytes at ``_LEAST_RATE``.

    Attributes:
        claim: reserves room for more bytes; None: no room is reserved.
        claimed: bytes for which room is reserved.
    """

    claim: Callable[[int], None] | None = None

    def __init__(self, receive: Receive, send: Send, most: int, seconds: float) -> None:
        self._receive, self._send, self._most, self._ends = receive, send, most, time.monotonic() + seconds
        self._read, self.claimed, self._begun, self._whole = 0, 0, False, False

    def announce(self, nbytes: int) -> None:
        """Reserve room for the first ``nbytes`` bytes of the body."""
        if self.claim is not None and nbytes > self.claimed:
            self.claim(nbytes - self.claimed)
            self.claimed = nbytes

    async def receive(self) -> Message:
        if self._whole or self._begun:  # the next message can only be a disconnect
            return await self._receive()
        try:
            async with asyncio.timeout(self._ends + self._read / _LEAST_RATE - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise _Refused(refusal(408, "the body came too slowly", headers=_CLOSE)) from None
        self._read += len(message.get("body", b""))
        self._whole = not message.get("more_body", False)
        if self._read > self._most:
            raise _Refused(_too_large(self._most))
        self.announce(self._read)
        return message

    async def send(self, message: Message) -> None:
        self._begun = True
        await self._send(message)


class _Refused(BaseException):
    """A request is refused. It is no ``Exception``, so that no handler of the app answers it.

    Args:
        answer: the refusal to send.
    """

    def __init__(self, answer: JSONResponse) -> None:
        super().__init__()
        self.answer = answer


def _too_large(most: int) -> JSONResponse:
    return refusal(413, f"a request has at most {most} bytes", headers=_CLOSE)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
