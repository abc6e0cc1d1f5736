"""Keys, bodies, lines, deadlines, and clients that leave."""

from __future__ import annotations

import io
import json
import logging
import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
import torch

from lorac import TextRequest
from lorac.backends.onnxruntime.engine import OrtProgram
from lorac.serving.request_log import LOGGER
from tests.refusing import refuses
from tests.serving.models import make_app, serve, wait_until

CHAT = {"model": "one", "messages": [{"role": "user", "content": "Say"}], "max_tokens": 2}
ENDLESS = {**CHAT, "max_tokens": 58, "logit_bias": {"2": -100}, "stream": True}


@pytest.fixture(scope="module")
def tight(compiled: Any) -> Iterator[Any]:
    """A server of one row and one place in line, for two tenants."""
    app = make_app(
        compiled,
        rows=1,
        waiting=1,
        max_new_tokens=60,
        keys={"k-a": "a", "k-b": "b"},
        max_body_bytes=600,
        pinned=("one",),
    )
    with serve(app) as url, httpx2.Client(base_url=url, headers={"authorization": "Bearer k-a"}) as http:
        yield app, http


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Three steps that may run, and as many as are released besides, so that a row stays at work."""
    allowed, decode = threading.Semaphore(3), OrtProgram.decode

    def gated(*given: Any) -> Any:
        assert allowed.acquire(timeout=60)
        return decode(*given)

    monkeypatch.setattr(OrtProgram, "decode", gated)
    return allowed


@pytest.mark.parametrize("key", ["", "Bearer", "Bearer k-c", "Basic k-a", "k-a", "Bearer k-a k-b"])
def test_a_key_is_needed(tight: Any, key: str) -> None:
    refused = tight[1].get("/v1/models", headers={"authorization": key})
    assert refused.status_code == 401
    assert "API key" in refused.json()["error"]["message"]
    assert tight[1].get("/health", headers={"authorization": key}).status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_has_a_limit(tight: Any, chunked: bool) -> None:
    body = json.dumps({**CHAT, "user": "x" * 900}).encode()
    content = (body[i : i + 100] for i in range(0, len(body), 100)) if chunked else body
    headers = {"content-type": "application/json"}
    refused = tight[1].post("/v1/chat/completions", content=content, headers=headers)
    assert refused.status_code == 413
    assert "600 bytes" in refused.json()["error"]["message"]


def test_a_disconnected_client_frees_its_row_and_place_in_the_queue(tight: Any, steps: threading.Semaphore) -> None:
    app, http = tight
    scheduler, path = app.state.scheduler, "/v1/chat/completions"
    with http.stream("POST", path, json=ENDLESS) as running:
        lines = running.iter_lines()  # a reader that is dropped closes its connection
        next(lines)
        with pytest.raises(httpx2.ReadTimeout):  # another waits for it, and its client does not wait so long
            http.post(path, json={**ENDLESS, "stream": False}, timeout=0.5)
        status = http.get("/v1/status").json()
        hidden = http.get("/v1/status", headers={"authorization": "Bearer k-b"}).json()
        wait_until(lambda: len(app.state.metrics.running) == 1)
    wait_until(lambda: not app.state.metrics.running)
    steps.release(1000)
    wait_until(lambda: scheduler.load == (0, 0))
    assert {row["model"] for row in status["rows"]} == {"one"}
    assert hidden["rows"] == []


def test_rejects_requests_while_the_queue_is_full(tight: Any, steps: threading.Semaphore) -> None:
    app, http = tight
    with http.stream("POST", "/v1/chat/completions", json=ENDLESS) as running:
        lines = running.iter_lines()
        next(lines)
        waiting = app.state.scheduler.submit(TextRequest(torch.tensor([5]), tenant="a", options={"max_new_tokens": 1}))
        full = http.post("/v1/chat/completions", json=CHAT)
        waiting.cancel()
    steps.release(1000)
    assert (full.status_code, full.headers["retry-after"]) == (429, "1")
    assert full.json()["error"]["code"] == "queue_full"
    never = http.post("/v1/chat/completions", json={**CHAT, "n": 2})
    assert (never.status_code, "retry-after" in never.headers) == (400, False)
    wait_until(lambda: app.state.scheduler.load == (0, 0))


def read_metrics(app: Any) -> dict[str, float]:
    lines = [line for line in app.state.metrics.expose().decode().splitlines() if not line.startswith("#")]
    return {line.partition("{")[0]: float(line.rsplit(" ", 1)[1]) for line in lines}


def test_tokens_are_counted_as_they_come(tight: Any, steps: threading.Semaphore) -> None:
    app, http = tight
    before = read_metrics(app)
    with http.stream("POST", "/v1/chat/completions", json=ENDLESS) as running:
        lines = running.iter_lines()
        wait_until(lambda: "content" in next(lines) and len(app.state.metrics.running) == 1)
        now = read_metrics(app)
    steps.release(1000)
    ended = "vllm:e2e_request_latency_seconds_count"
    assert now[ended] == before[ended]
    for name in ("generation_tokens_total", "prompt_tokens_total", "time_to_first_token_seconds_count"):
        assert now[f"vllm:{name}"] > before[f"vllm:{name}"], name
    wait_until(lambda: app.state.scheduler.load == (0, 0))


def test_metrics_count_requests_and_tokens(tight: Any) -> None:
    app, http = tight
    assert http.post("/v1/chat/completions", json={**CHAT, "logit_bias": {"2": -100}}).status_code == 200
    wait_until(lambda: app.state.scheduler.load == (0, 0))
    found = read_metrics(app)
    for name in ("generation_tokens_total", "prompt_tokens_total", "time_to_first_token_seconds_count"):
        assert found[f"vllm:{name}"] > 0, name
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0
    assert 0 <= found["vllm:kv_cache_usage_perc"] <= 1
    assert found["lorac_adapters_registered"] == 2
    assert found["lorac_bank_bytes"] > 0
    assert found["lorac_prefill_chunk_tokens"] == app.state.settings.chunk
    assert "vllm:lora_requests_info" in found


@pytest.mark.parametrize("name", ["one:0.5", "one+two", "base"])
def test_rejects_an_adapter_that_requests_cannot_name_at_the_start(compiled: Any, name: str) -> None:
    compiled.add_adapter(compiled.adapters["one"], name=name)
    try:
        with refuses("adapter_error", match=re.escape(f"'{name}'")):
            make_app(compiled)
    finally:
        compiled.remove_adapter(name)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    written, level = io.StringIO(), LOGGER.level
    handler = logging.StreamHandler(written)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield written
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


def test_the_log_has_a_line_of_json_for_each_request(tight: Any, log: io.StringIO) -> None:
    http, odd = tight[1], 'u"\n\x1b[2K\u2028é'
    answers = [
        http.post("/v1/chat/completions", json={**CHAT, "user": odd, "logit_bias": {"2": -100}}),
        http.get("/v1/%0A%1B%E2%80%A8"),
        http.get("/v1/models", headers={"authorization": "Bearer k-c"}),
    ]
    wait_until(lambda: log.getvalue().count("\n") == len(answers))
    lines = log.getvalue().splitlines()
    assert all(line.isascii() and line.isprintable() for line in lines)
    text, path, keyless = map(json.loads, lines)
    assert {name: text[name] for name in ("status", "tenant", "user", "completion_tokens", "finish_reasons")} == {
        "status": 200,
        "tenant": "a",
        "user": odd,
        "completion_tokens": CHAT["max_tokens"],
        "finish_reasons": ["length"],
    }
    assert [answer.status_code for answer in answers] == [line["status"] for line in (text, path, keyless)]
    assert (path["method"], path["path"], path["status"]) == ("GET", "/v1/\n\x1b\u2028", 404)
    assert (keyless["status"], keyless["tenant"]) == (401, None)
    assert "Say" not in "".join(lines)


def test_without_a_store_nothing_is_loaded_nor_unloaded(tight: Any) -> None:
    http = tight[1]
    load = http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "x"})
    assert (load.status_code, "no store" in load.json()["error"]["message"]) == (403, True)
    for name, reason in {"two": "no store", "one": "pinned"}.items():
        refused = http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        assert (refused.status_code, reason in refused.json()["error"]["message"]) == (403, True)


def test_a_deadline_ends_a_request(compiled: Any) -> None:
    with (
        serve(make_app(compiled, deadline=1e-6)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client,
    ):
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError, match="deadline") as failed:
                client.chat.completions.create(**{**CHAT, "stream": stream})
            assert failed.value.status_code == 504


def test_a_stopping_server_finishes_running_requests(compiled: Any) -> None:
    app = make_app(compiled)
    found: list[str] = []
    with httpx2.Client() as http:
        with serve(app) as url:
            running = http.send(
                http.build_request("POST", f"{url}/v1/chat/completions", json={**ENDLESS, "max_tokens": 30}),
                stream=True,
            )
            reader = threading.Thread(target=lambda: found.extend(running.iter_lines()))
            reader.start()
            wait_until(lambda: len(found) > 2)
        reader.join()
    assert found[-2:] == ["data: [DONE]", ""]


def test_health_fails_once_the_scheduler_has_stopped(compiled: Any) -> None:
    app = make_app(compiled)
    with serve(app) as url:
        assert httpx2.get(f"{url}/health").status_code == 200
        app.state.scheduler.close()
        assert httpx2.get(f"{url}/health").status_code == 503


def test_no_other_origin_may_read_answers(tight: Any) -> None:
    answer = tight[1].get("/v1/models", headers={"origin": "https://elsewhere.example"})
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]
