"""Wrong requests: each has a status and a sentence that names the fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

import lorac
from lorac.serving.refusals import error_status

CHAT = {"model": "one", "messages": [{"role": "user", "content": "Say"}], "max_tokens": 2}
TEXT = {"model": "one", "prompt": "Say", "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}


def turn(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x", **fields}]}


CHATS: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "oen"}, 404, "'oen'"),
    ({"model": ""}, 404, "no adapter"),
    ({"model": 5}, 400, "'model'"),
    ({"model": "one:x+two:1"}, 404, "one:x+two:1"),
    ({"model": "one:1+tow:1"}, 404, "'tow'"),
    ({"model": "one:1+one:2"}, 400, "'model' names an adapter twice"),
    ({"model": "one:1e999"}, 400, "finite"),
    ({"model": "one:1-1"}, 400, "'model' has the strength"),
    ({"adapters": "two"}, 400, "'adapters' and 'model'"),
    ({"model": "base", "adapters": "tow"}, 404, "'tow'"),
    ({"model": "base", "adapters": ["one"]}, 400, "'adapters' is a list"),
    ({"model": "base", "adapters": {"one": "much"}}, 400, "'adapters"),
    ({"model": "base", "adapters": {"one": {"rank": 0}}}, 400, "'adapters"),
    ({"messages": []}, 400, "'messages'"),
    ({"messages": "hello"}, 400, "'messages'"),
    ({"messages": None}, 400, "'messages' is missing"),
    (turn(role="wizard"), 400, "'messages[0].role'"),
    (turn(content=5), 400, "'messages[0].content"),
    (
        turn(content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        400,
        "'messages' holds an image, and this",
    ),
    (turn(content=[{"type": "input_audio"}]), 400, "'messages[0].content[0].type' is wrong"),
    (turn(content=[{"type": "text"}]), 400, "'messages[0].content[0].text' is missing"),
    (turn(mood="good"), 400, "'messages[0].mood'"),
    (turn(role="assistant", tool_calls=[CALL]), 400, "'messages' holds a call of 'f'"),
    ({"messages": CHAT["messages"] * 30}, 400, "'max_tokens'"),
    ({"max_tokens": 0}, 400, "'max_tokens'"),
    ({"max_tokens": 2.5}, 400, "'max_tokens'"),
    ({"max_tokens": "2"}, 400, "'max_tokens'"),
    ({"max_tokens": 41}, 400, "'max_tokens' is 41"),
    ({"max_tokens": 1000}, 400, "'max_tokens' is 1000"),
    ({"max_completion_tokens": 3}, 400, "'max_completion_tokens'"),
    ({"temperature": -1}, 400, "'temperature'"),
    ({"temperature": 2.1}, 400, "'temperature'"),
    ({"temperature": "hot"}, 400, "'temperature'"),
    ({"temprature": 1}, 400, "nearest: 'temperature'"),
    ({"top_p": 0}, 400, "'top_p'"),
    ({"top_k": -2}, 400, "'top_k'"),
    ({"min_p": 2}, 400, "'min_p'"),
    ({"repetition_penalty": 0}, 400, "'repetition_penalty'"),
    ({"presence_penalty": 3}, 400, "'presence_penalty'"),
    ({"frequency_penalty": -3}, 400, "'frequency_penalty'"),
    ({"n": 0}, 400, "'n'"),
    ({"n": 17}, 400, "'n'"),
    ({"seed": -1}, 400, "'seed'"),
    ({"seed": 1 << 64}, 400, "'seed'"),
    ({"stop": ["a"] * 5}, 400, "'stop' is wrong: List should have at most 4 items"),
    ({"stop": [""]}, 400, "'stop' holds an empty string"),
    ({"stop": 5}, 400, "'stop"),
    ({"stream": "yes"}, 400, "'stream'"),
    ({"stream_options": {"include_usage": True}}, 400, "'stream_options' is for streams"),
    ({"stream": True, "stream_options": {"usage": True}}, 400, "'stream_options.usage'"),
    ({"top_logprobs": 2}, 400, "'top_logprobs' needs"),
    ({"logprobs": True, "top_logprobs": 21}, 400, "'top_logprobs'"),
    ({"logprobs": 2}, 400, "'logprobs'"),
    ({"logit_bias": {"a": 1}}, 400, "'logit_bias'"),
    ({"logit_bias": {"1": 101}}, 400, "'logit_bias"),
    ({"logit_bias": {"97": 1}}, 400, "'logit_bias'"),
    ({"logit_bias": {"0" * 5000 + "9": 1}}, 400, "'logit_bias' has the key"),
    ({"n": 16, "messages": [{"role": "user", "content": "Say"}], "max_tokens": 1 << 70}, 400, "'max_tokens'"),
    ({"tools": [TOOL]}, 400, "'tools'"),
    ({"tools": [{"type": "retrieval"}]}, 400, "'tools[0]"),
    ({"tool_choice": "required"}, 400, "'tool_choice'"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, 400, "'tool_choice'"),
    ({"parallel_tool_calls": 3}, 400, "'parallel_tool_calls'"),
    ({"store": True}, 400, "'store' can only be false"),
    ({"min_tokens": 1}, 400, "'min_tokens'"),
    ({"ignore_eos": True}, 400, "'ignore_eos'"),
    ({"response_format": {"type": "xml"}}, 400, "'response_format.type'"),
    ({"response_format": {"type": "json_schema"}}, 400, "'response_format'"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "fish"}}}},
        400,
        "'response_format' has no usable schema",
    ),
    ({"functions": []}, 400, "'functions'"),
    ({"modalities": ["audio"]}, 400, "'modalities'"),
    ({"service_tier": "flex"}, 400, "'service_tier'"),
]
TEXTS: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt": ""}, 400, "'prompt' is empty"),
    ({"prompt": []}, 400, "'prompt"),
    ({"prompt": None}, 400, "'prompt' is missing"),
    ({"prompt": [97]}, 400, "not a token id"),
    ({"prompt": [-1]}, 400, "'prompt[0]' is wrong: Input should be greater"),
    ({"prompt": ["a", 5]}, 400, "'prompt[1]' is wrong: Input should be a valid string"),
    ({"prompt": ["a"] * 70}, 400, "'prompt' is wrong: Value should have at most 64 items"),
    ({"prompt": [10**21]}, 400, "'prompt"),
    ({"prompt": [1 << 63]}, 400, "'prompt"),
    ({"prompt": ["a"] * 5, "n": 16}, 400, "80 requests come at once, and at most 64 may wait"),
    ({"logprobs": 6}, 400, "'logprobs'"),
    ({"logprobs": True}, 400, "'logprobs'"),
    ({"echo": True}, 400, "'echo'"),
    ({"best_of": 2}, 400, "'best_of' can only be 1 on this server; leave it out"),
    ({"model": "one:x"}, 404, "'one:x'; nearest: one; a strength is a number, as in one:0.7"),
    ({"model": "one:e"}, 400, "'model' has the strength 'e', which is not a number; write one:0.7"),
    ({"suffix": "x"}, 400, "'suffix'"),
    ({"model": "base", "adapters": ["one", "two"]}, 400, "'adapters' holds 2 choices for 1 prompts"),
]
BODIES: list[tuple[str, bytes, int, str]] = [
    ("POST /v1/chat/completions", b"{", 400, "not JSON"),
    ("POST /v1/chat/completions", b"[]", 400, "JSON"),
    ("POST /v1/chat/completions", b"", 400, "no body"),
    ("POST /v1/chat/completions", b'{"model": NaN}', 400, "'model'"),
    ("POST /v1/chat/completions", b"\xff\xfe", 400, "JSON"),
    ("POST /v1/completions", b'{"model": "one", "prompt": "\\ud800"}', 400, "not JSON"),
    ("POST /v1/completions", b'{"model": "\\udfff", "prompt": "x"}', 400, "not JSON"),
    ("POST /v1/completions", b'{"model": "one", "prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", 400, "recursion"),
    ("POST /v1/completions", b'{"model": "one", "seed": ' + b"9" * 5000 + b"}", 400, "JSON"),
    ("POST /v1/completions", json.dumps(dict.fromkeys(map(str, range(1100)))).encode(), 400, "an object has 1100 keys"),
    ("GET /v1/chat/completions", b"", 405, "method"),
    ("POST /v1/audio/speech", b"{}", 404, "path"),
    ("POST /v1/adapters", b"{}", 404, "start the server with --store"),
    ("POST /v1/predict", b"{}", 404, "start the server with --predict"),
    ("GET /nothing-like-it", b"", 404, "docs/serving.md"),
    ("GET /docs", b"", 404, "path"),
]


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=url) as made:
        yield made


def check(answer: httpx2.Response, status: int, sentence: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, sentence in error["message"]) == (status, True), (answer.status_code, error["message"])
    assert {*error} == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert status != 400 or "retry-after" not in answer.headers


@pytest.mark.parametrize(("fields", "status", "sentence"), CHATS, ids=lambda value: str(value)[:40])
def test_wrong_chats(http: httpx2.Client, fields: dict[str, Any], status: int, sentence: str) -> None:
    check(http.post("/v1/chat/completions", json={**CHAT, **fields}), status, sentence)


@pytest.mark.parametrize(("fields", "status", "sentence"), TEXTS, ids=lambda value: str(value)[:40])
def test_wrong_completions(http: httpx2.Client, fields: dict[str, Any], status: int, sentence: str) -> None:
    check(http.post("/v1/completions", json={**TEXT, **fields}), status, sentence)


@pytest.mark.parametrize(("request_line", "body", "status", "sentence"), BODIES, ids=lambda value: str(value)[:40])
def test_wrong_bodies(http: httpx2.Client, request_line: str, body: bytes, status: int, sentence: str) -> None:
    method, path = request_line.split()
    check(http.request(method, path, content=body, headers={"content-type": "application/json"}), status, sentence)


USUAL = {
    **{"echo": False, "best_of": 1, "suffix": "", "store": False, "metadata": {"run": "7"}, "service_tier": "auto"},
    **{"safety_identifier": "u", "prompt_cache_key": "k", "top_k": -1, "ignore_eos": False, "min_tokens": 0},
    **{"stop_token_ids": [], "parallel_tool_calls": True, "seed": 4, "modalities": ["text"]},
}


@pytest.mark.parametrize(("path", "fields"), [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT)])
def test_takes_fields_that_change_nothing(http: httpx2.Client, path: str, fields: dict[str, Any]) -> None:
    plain = http.post(path, json={**fields, "seed": 4, "top_k": 0}).json()
    found = http.post(path, json={**fields, **USUAL})
    assert (found.status_code, found.json().get("choices")) == (200, plain["choices"]), found.text


def test_a_rejected_request_leaves_nothing_behind(http: httpx2.Client) -> None:
    wrong = json.dumps({**CHAT, "seed": -1}).encode()
    http.post("/v1/chat/completions", content=wrong, headers={"content-type": "application/json"})
    status = http.get("/v1/status").json()
    assert (status["running"], status["waiting"], status["rows"]) == (0, 0, [])


def test_refusals_that_no_waiting_ends_name_no_time_to_come_again() -> None:
    too_large = lorac.OverBudget("a mixture").for_good()
    assert [error_status(error) for error in (too_large, lorac.OverBudget("a mixture"))] == [400, 503]
    assert error_status(lorac.FormatError("a file", code="over_budget")) == 400
