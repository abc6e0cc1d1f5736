"""No tenant keeps another out: the line, the bodies of requests, and connections."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from lorac.backends.onnxruntime.engine import OrtProgram
from lorac.serving import build_app
from lorac.serving.store import AdapterStore, StoreQuotas
from tests.serving.models import serve, settings
from tests.serving.test_limits import CHAT, ENDLESS, log, wait_until

__all__ = ["log"]
KEYS = {"k-a": "alice", "k-b": "bob"}


@pytest.fixture(scope="module")
def store(compiled: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AdapterStore]:
    quotas = StoreQuotas(uploads_per_minute=3, bytes=100_000)
    with AdapterStore(compiled, tmp_path_factory.mktemp("tenants"), quotas=quotas) as made:
        yield made


@pytest.fixture(scope="module")
def small(compiled: Any, store: AdapterStore) -> Iterator[Any]:
    """A server of a row and two places in line, of few bytes and seconds."""
    limits = {"max_spool_bytes": 90_000, "max_upload_bytes": 60_000, "body_timeout": 0.5, "header_timeout": 0.5}
    given = settings(rows=1, waiting=2, max_new_tokens=60, keys=KEYS, max_connections=8, **limits)
    app = build_app(compiled, given, store=store)
    with serve(app) as url:
        yield app, url


@pytest.fixture
def alice(small: Any) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=small[1], headers={"authorization": "Bearer k-a"}, timeout=60) as client:
        yield client


@pytest.fixture
def bob(small: Any) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=small[1], headers={"authorization": "Bearer k-b"}, timeout=60) as client:
        yield client


@contextlib.contextmanager
def connected(url: str, sent: bytes = b"") -> Iterator[socket.socket]:
    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=20) as made:
        made.sendall(sent)
        yield made


def upload_head(nbytes: int, key: str = "k-a") -> bytes:
    """The head and the beginning of an upload of so many bytes."""
    lines = ["POST /v1/adapters HTTP/1.1", "Host: x", f"Authorization: Bearer {key}", f"Content-Length: {nbytes}"]
    body = '--x\r\nContent-Disposition: form-data; name="files"; filename="y"\r\n\r\n'
    return "\r\n".join([*lines, "Content-Type: multipart/form-data; boundary=x", "", body]).encode()


def test_a_tenant_that_fills_the_line_keeps_no_other_out(
    small: Any, alice: httpx2.Client, bob: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses, decode, path = list[int](), OrtProgram.decode, "/v1/chat/completions"

    def slowed(*given: Any) -> Any:
        time.sleep(0.01)
        return decode(*given)

    def fill(count: int) -> None:
        fields = {**ENDLESS, "stream": False, "n": count, "max_tokens": 25}
        statuses.append(alice.post(path, json=fields).status_code)

    monkeypatch.setattr(OrtProgram, "decode", slowed)
    filling = [threading.Thread(target=fill, args=(count,)) for count in (1, 2)]
    for thread, load in zip(filling, [(1, 0), (1, 2)], strict=True):
        thread.start()
        wait_until(lambda load=load: small[0].state.scheduler.load == load)  # type: ignore[misc]  # a default
    refused, taken = (client.post(path, json=CHAT).status_code for client in (alice, bob))
    for thread in filling:
        thread.join()
    assert (refused, taken, statuses) == (429, 200, [200, 200])


def test_rejects_an_upload_before_its_bytes_are_received(small: Any, alice: httpx2.Client, store: AdapterStore) -> None:
    files = {"files": ("x.safetensors", b"x")}
    statuses = [alice.post("/v1/adapters", data={"name": "n"}, files=files).status_code for _ in range(4)]
    assert statuses == [400, 400, 400, 429]
    with connected(small[1], upload_head(40_000)) as waiting:
        assert b" 429 " in waiting.recv(4000).split(b"\r\n")[0]
    store._tenants["alice"].account._uploads.clear()


def test_bytes_of_unfinished_uploads_are_bounded(small: Any, store: AdapterStore) -> None:
    before = spooled()
    with contextlib.ExitStack() as stack:
        first, second, other = (
            stack.enter_context(connected(small[1], upload_head(30_000, key))) for key in ("k-a", "k-a", "k-b")
        )
        assert b" 429 " in second.recv(4000).split(b"\r\n")[0]
        for each in (first, other):
            assert b" 408 " in each.recv(4000).split(b"\r\n")[0]
    wait_until(lambda: spooled() == before)
    account = store._open_account("alice").account
    account.add(nbytes=90_000)
    assert b" 403 " in read_status(small[1], upload_head(30_000))
    account.add(nbytes=-90_000)
    assert b" 408 " in read_status(small[1], upload_head(30_000))


def read_status(url: str, sent: bytes) -> bytes:
    with connected(url, sent) as waiting:
        return waiting.recv(4000).split(b"\r\n")[0]


def spooled() -> int:
    """Files of this process that have no name, as bodies on disk have."""
    count = 0
    for name in list_handles():
        with contextlib.suppress(FileNotFoundError):  # other threads close theirs
            count += "(deleted)" in os.readlink(f"/proc/self/fd/{name}")
    return count


def list_handles() -> list[str]:
    return [path.name for path in Path("/proc/self/fd").iterdir() if path.is_symlink() and os.path.lexists(path)]


def test_a_chunked_upload_is_counted_as_it_comes(alice: httpx2.Client, store: AdapterStore) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="y"\r\n\r\n'
    content = (part * (not number) + bytes(10_000) for number in range(5))
    headers = {"content-type": "multipart/form-data; boundary=x"}
    refused = alice.post("/v1/adapters", content=content, headers=headers)
    assert (refused.status_code, "bytes of uploads" in refused.text) == (429, True), refused.text


def test_one_tenants_slow_uploads_do_not_hold_another(
    small: Any, alice: httpx2.Client, bob: httpx2.Client, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, running = threading.Event(), list[str]()

    def slow(tenant: str, *given: Any, **more: Any) -> Any:
        running.append(tenant)
        assert tenant == "bob" or opened.wait(60)
        raise lorac.FormatError("it is read")

    import lorac

    monkeypatch.setattr(AdapterStore, "upload", lambda self, tenant, *given, **more: slow(tenant))
    files = {"files": ("x.safetensors", b"x")}

    def send(client: httpx2.Client) -> int:
        return client.post("/v1/adapters", data={"name": "n"}, files=files).status_code

    readers = [threading.Thread(target=send, args=(alice,)) for _ in range(3)]
    for reader in readers:
        reader.start()
    wait_until(lambda: running == ["alice"])
    assert send(bob) == 400
    assert running == ["alice", "bob"]
    opened.set()
    for reader in readers:
        reader.join()


def test_one_tenants_long_texts_do_not_hold_another(
    small: Any, alice: httpx2.Client, bob: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, running = threading.Event(), list[str]()

    def tokenize(text: str) -> dict[str, list[int]]:
        running.append(text)
        assert text == "short" or opened.wait(60)
        return {"input_ids": [1]}

    monkeypatch.setattr(small[0].state.text, "_tokenizer", tokenize)

    def send(client: httpx2.Client, text: str) -> int:
        return client.post("/tokenize", json={"prompt": text}).status_code

    waiting = [threading.Thread(target=send, args=(alice, "long")) for _ in range(3)]
    for one in waiting:
        one.start()
    wait_until(lambda: running == ["long"])
    assert send(bob, "short") == 200
    assert running == ["long", "short"], "alice's other requests wait for her first"
    opened.set()
    for one in waiting:
        one.join()


def test_closes_connections_that_send_no_whole_request(small: Any, alice: httpx2.Client) -> None:
    assert alice.get("/v1/models").status_code == 200
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k-a\r\n"
    with (
        connected(small[1]) as silent,
        connected(small[1], head) as half,
        connected(small[1], head + b"\r\n") as second,
    ):
        answer = b""
        while not answer.endswith(b"]}"):
            answer += second.recv(4000)
        second.sendall(b"GET")
        begun = time.monotonic()
        for each in (silent, half, second):
            assert each.recv(4000) == b""
        assert time.monotonic() - begun < 5


def test_closes_the_connections_that_wait_longest_of_too_many(
    small: Any, alice: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(small[1])) for _ in range(20)]
        wait_until(lambda: alice.get("/health").status_code == 200)
        assert idle[0].recv(1) == b""


def test_a_tenant_has_half_of_the_requests_at_a_time(small: Any, bob: httpx2.Client) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer k-a\r\nContent-Length: 9\r\n\r\n"
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(connected(small[1], head)) for _ in range(5)]
        assert bob.post("/v1/completions", json={"model": "one", "prompt": "Say", "max_tokens": 1}).status_code == 200
        statuses = sorted(each.recv(4000).split(b" ")[1] for each in slow)
    assert statuses == [b"408"] * 4 + [b"429"]


def test_paces_the_refusals_of_a_tenant(alice: httpx2.Client, bob: httpx2.Client) -> None:
    def refuse(client: httpx2.Client) -> float:
        begun = time.monotonic()
        assert client.get("/v1/nothing").status_code == 404
        return time.monotonic() - begun

    time.sleep(1)  # those of earlier tests are forgotten
    begun, first = time.monotonic(), [refuse(alice) for _ in range(20)]
    asked = [threading.Thread(target=lambda: [refuse(alice) for _ in range(5)]) for _ in range(4)]
    for one in asked:
        one.start()
    assert refuse(bob) + sum(first) < 0.5
    for one in asked:
        one.join()
    assert time.monotonic() - begun > 0.5, "25 at once, and then one every 40 ms"


def test_metrics_and_states_of_all_tenants_are_for_none_of_them(
    small: Any, alice: httpx2.Client, bob: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = OrtProgram.decode
    monkeypatch.setattr(OrtProgram, "decode", lambda *given: (time.sleep(0.05), decode(*given))[1])
    refused = alice.get("/metrics")
    assert (refused.status_code, "--metrics-port" in refused.text) == (403, True)
    with alice.stream("POST", "/v1/chat/completions", json={**ENDLESS, "max_tokens": 40}) as running:
        lines = running.iter_lines()  # a reader that is dropped closes its connection
        next(lines)
        own, other = (client.get("/v1/status").json() for client in (alice, bob))
    assert (own["running"], len(own["rows"]), own["adapters"]["registered"]) == (1, 1, 2)
    assert (other["running"], other["waiting"], other["rows"]) == (0, 0, [])


def test_answers_are_counted_by_status_and_bear_the_number_of_their_request(
    small: Any, alice: httpx2.Client, log: io.StringIO
) -> None:
    def counts() -> dict[str, float]:
        text = small[0].state.metrics.expose().decode()
        return {
            status: float(n)
            for status, n in re.findall(r'^lorac_http_responses_total{status="(\d+)"} (.*)$', text, re.M)
        }

    before = counts()
    given = alice.get("/v1/nothing", headers={"x-request-id": "its-own"})
    made = [alice.get("/health", headers=headers) for headers in ({}, {"x-request-id": "a b"})]
    wait_until(lambda: counts().get("404", 0) == before.get("404", 0) + 1)
    wait_until(lambda: counts()["200"] == before["200"] + 2)
    assert given.headers["x-request-id"] == "its-own"
    assert all(re.fullmatch("[0-9a-f]{32}", one.headers["x-request-id"]) for one in made)
    (line,) = map(json.loads, log.getvalue().splitlines())
    assert (line["path"], line["request_id"]) == ("/v1/nothing", "its-own")
