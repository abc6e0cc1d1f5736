"""A server that is to stop finishes what runs, and sends the rest elsewhere."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import uvicorn

from lorac.serving.draining import DrainingServer
from tests.serving.models import make_app, serve, wait_until
from tests.serving.test_limits import CHAT, ENDLESS, steps

__all__ = ["steps"]


@contextlib.contextmanager
def drained(compiled: Any, grace: float) -> Iterator[tuple[DrainingServer, Any, httpx2.Client, list[str]]]:
    """Run a server of one row with a stream at work; its lines, and one request in line."""
    app, servers, lines = make_app(compiled, rows=1, waiting=4, max_new_tokens=60), list[DrainingServer](), list[str]()

    def make(config: uvicorn.Config) -> uvicorn.Server:
        servers.append(DrainingServer(config, app, grace))
        return servers[0]

    with serve(app, make) as url, httpx2.Client(base_url=url, timeout=30) as http:
        request = http.build_request("POST", "/v1/chat/completions", json={**ENDLESS, "max_tokens": 20})
        running = http.send(request, stream=True)
        reader = threading.Thread(target=lambda: lines.extend(running.iter_lines()))
        reader.start()
        wait_until(lambda: len(lines) > 2)
        yield servers[0], app, http, lines
        reader.join()


def test_finishes_a_stream_and_refers_other_requests_elsewhere(compiled: Any, steps: threading.Semaphore) -> None:
    answers: list[httpx2.Response] = []
    with drained(compiled, grace=60) as (server, app, http, lines):
        assert http.get("/ready").status_code == 200
        waiter = threading.Thread(target=lambda: answers.append(http.post("/v1/chat/completions", json=CHAT)))
        waiter.start()
        wait_until(lambda: app.state.scheduler.load == (1, 1))
        server.handle_exit(signal.SIGTERM, None)
        waiter.join()
        answers.append(http.post("/v1/chat/completions", json=CHAT))
        assert [http.get(path).status_code for path in ("/ready", "/health", "/v1/models")] == [503, 200, 503]
        steps.release(1000)
    assert lines[-2:] == ["data: [DONE]", ""]
    for answer in answers:
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"]["code"] == "stopping"


def test_ends_a_stream_by_an_event_once_its_time_is_over(compiled: Any, steps: threading.Semaphore) -> None:
    with drained(compiled, grace=0.3) as (server, _, _, lines):
        server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: server.should_exit)
        steps.release(1000)
    assert "deadline" in lines[-2]
    assert len(lines) < 20
