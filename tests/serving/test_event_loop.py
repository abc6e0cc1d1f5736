"""The event loop, on which all answers wait, computes nothing that grows with a request."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from lorac.serving.answers.connection import JsonAnswer
from lorac.serving.text_service import TextService
from tests.serving.models import make_app, serve

LONGEST = 0.05
"""Seconds of processor time that a callback of the loop may take."""
TEXT: dict[str, Any] = {"model": "one", "prompt": "Say", "max_tokens": 2}
CHAT: dict[str, Any] = {"model": "one", "messages": [{"role": "user", "content": "Say"}], "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"enum": ["x" * 10] * 500}}}
MANY_KEYS = {f"k{i}": 0 for i in range(60_000)}
LONG = "u" * 900_000
SCHEMA = {"name": "s", "schema": {"enum": [f"v{i}" for i in range(20_000)]}}
REQUESTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "the longest stop strings": ("completions", {**TEXT, "stop": ["u" * 1024] * 4}, 200),
    "a stop string": ("completions", {**TEXT, "stop": LONG}, 400),
    "many stop strings": ("completions", {**TEXT, "stop": ["u"] * 200_000}, 400),
    "biases": ("completions", {**TEXT, "logit_bias": {str(i): 1 for i in range(49_000)}}, 400),
    "a bias": ("completions", {**TEXT, "logit_bias": {LONG: 1}}, 400),
    "a mixture": ("completions", {**TEXT, "model": "one:1+" * 150_000}, 400),
    "a name": ("completions", {**TEXT, "model": "o" * 4000}, 404),
    "a user": ("completions", {**TEXT, "user": LONG}, 400),
    "an unknown field": ("completions", {**TEXT, LONG: 1}, 400),
    "unknown fields": ("completions", {**TEXT, **MANY_KEYS}, 400),
    "choices": ("completions", {**TEXT, "model": "base", "adapters": [{}] * 200_000}, 400),
    "a choice": ("completions", {**TEXT, "model": "base", "adapters": {f"k{i}": 1 for i in range(60_000)}}, 400),
    "a prompt": ("completions", {**TEXT, "prompt": LONG[:200_000]}, 400),
    "a prompt of ids": ("completions", {**TEXT, "prompt": [5] * 300_000}, 400),
    "a prompt of wrong ids": ("completions", {**TEXT, "prompt": ["a", 5] * 100_000}, 400),
    "prompts": ("completions", {**TEXT, "prompt": [[5]] * 150_000}, 400),
    "messages": ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": ""}] * 20_000}, 400),
    "wrong messages": ("chat/completions", {**CHAT, "messages": [{}] * 200_000}, 400),
    "a message of many fields": ("chat/completions", {**CHAT, "messages": [MANY_KEYS]}, 400),
    "parts": ("chat/completions", {**CHAT, "messages": [{"role": "user", "content": [1] * 300_000}]}, 400),
    "tools": ("chat/completions", {**CHAT, "tools": [TOOL] * 128}, 400),
    "a schema": (
        "chat/completions",
        {**CHAT, "response_format": {"type": "json_schema", "json_schema": SCHEMA}},
        200,
    ),
    "log-probabilities": (
        "chat/completions",
        {**CHAT, "n": 16, "max_tokens": 40, "logprobs": True, "top_logprobs": 20, "logit_bias": {"2": -100}},
        200,
    ),
    "outputs": ("predict", {"model": "one", "inputs": {"input_ids": [[5] * 60] * 64}}, 200),
    "too many outputs": ("predict", {"model": "one", "inputs": {"input_ids": [[5] * 60] * 1000}}, 400),
    "too many rows": ("predict", {"model": "one", "inputs": {"input_ids": [[5]] * 5000}}, 400),
}


@pytest.fixture(scope="module")
def http(compiled: Any) -> Iterator[httpx2.Client]:
    app = make_app(compiled, predict=True)
    with serve(app) as url, httpx2.Client(base_url=url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def image_http(images: Any) -> Iterator[httpx2.Client]:
    with serve(make_app(images)) as url, httpx2.Client(base_url=url, timeout=60) as made:
        yield made


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[float, str]]]:
    """The seconds of processor time of each callback of loops in other threads; no collector runs meanwhile."""
    run, noted = asyncio.Handle._run, list[tuple[float, str]]()

    def measured(handle: asyncio.Handle) -> None:
        shown = repr(handle)  # which writes out all that a request holds, as no server does
        begun = time.thread_time()
        run(handle)
        if threading.current_thread() is not threading.main_thread():
            noted.append((time.thread_time() - begun, shown))

    monkeypatch.setattr(asyncio.Handle, "_run", measured)
    gc.collect()
    gc.disable()
    yield noted
    gc.enable()


@pytest.mark.parametrize("name", REQUESTS)
def test_no_request_keeps_the_loop(name: str, http: httpx2.Client, pauses: list[tuple[float, str]]) -> None:
    path, fields, status = REQUESTS[name]
    body = json.dumps(fields).encode()
    assert len(body) < 1 << 20, "the server refuses it unread"
    answer = http.post(f"/v1/{path}", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status, answer.text[:300]
    assert len(pauses) > 5
    assert max(pauses)[0] < LONGEST, max(pauses)
    assert status == 200 or len(answer.content) < 5000


def _noise(side: int) -> str:
    """The data URL of a picture that no compression makes smaller."""
    written = io.BytesIO()
    Image.frombytes("RGB", (side, side), random.Random(0).randbytes(3 * side * side)).save(written, "PNG")
    return f"data:image/png;base64,{base64.b64encode(written.getvalue()).decode()}"


@pytest.mark.parametrize(
    ("urls", "status"),
    [
        pytest.param([_noise(1000)], 200, id="an image"),
        pytest.param([_noise(300)] * 8, 200, id="images"),
        pytest.param([_noise(1000)[:-5000]], 400, id="a part of an image"),
        pytest.param([""] * 30_000, 400, id="too many images"),
        pytest.param(["data:image/png;base64," + "!" * 4_000_000], 400, id="no image"),
    ],
)
def test_no_image_keeps_the_loop(
    urls: list[str], status: int, image_http: httpx2.Client, pauses: list[tuple[float, str]]
) -> None:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    answer = image_http.post(
        "/v1/chat/completions", json={**CHAT, "messages": [{"role": "user", "content": parts}], "stream": status == 200}
    )
    assert answer.status_code == status, answer.text[:300]
    assert max(pauses)[0] < LONGEST, max(pauses)
    assert status == 200 or len(answer.content) < 5000


@pytest.mark.parametrize("name", ["log-probabilities", "a schema"])
def test_no_stream_keeps_the_loop(name: str, http: httpx2.Client, pauses: list[tuple[float, str]]) -> None:
    path, fields, _ = REQUESTS[name]
    answer = http.post(f"/v1/{path}", json={**fields, "stream": True})
    assert answer.text.endswith("data: [DONE]\n\n")
    assert max(pauses)[0] < LONGEST, max(pauses)


def test_a_text_model_gives_outputs_only_where_its_server_is_set_to(url: str, http: httpx2.Client) -> None:
    fields = {"model": "one", "inputs": {"input_ids": [[5]]}}
    assert httpx2.post(f"{url}/v1/predict", json=fields).status_code == 404
    assert http.post("/v1/predict", json=fields).status_code == 200


def test_rejects_a_prompt_of_too_many_tokens_before_it_is_copied(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, seconds = TextService.begin_completion, list[float]()

    def measured(*given: Any) -> Any:
        begun = time.thread_time()
        try:
            return begin(*given)
        finally:
            seconds.append(time.thread_time() - begun)

    monkeypatch.setattr(TextService, "begin_completion", measured)
    for _ in range(3):
        assert http.post("/v1/completions", json={**TEXT, "prompt": [5] * 300_000}).status_code == 400
    assert min(seconds) < 0.03, "the interpreter is free for others; a copy takes torch 50 ms"


def test_other_threads_run_while_an_answer_is_written() -> None:
    writer, turns = threading.Thread(target=JsonAnswer, args=([[0.123456789] * 1000] * 400,)), 0
    writer.start()
    while writer.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 4
