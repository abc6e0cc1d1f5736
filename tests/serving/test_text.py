"""OpenAI's own client gets the tokens of ``generate``."""

from __future__ import annotations

import asyncio
import json
import subprocess
from typing import Any

import httpx2
import openai
import pytest

import lorac
from tests.serving.models import alone

CHAT = [{"role": "user", "content": "Say"}]
PROMPT = "uSay;"
GREEDY = {"do_sample": False}
DRAWN = {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "top_k": 0}


@pytest.mark.parametrize(
    ("model", "choice"), [("base", None), ("one", "one"), ("one:0.7+two:-0.3", {"one": 0.7, "two": -0.3})]
)
def test_a_chat_answers_as_generate_does(client: openai.OpenAI, compiled: Any, model: str, choice: Any) -> None:
    greedy = client.chat.completions.create(model=model, messages=CHAT, temperature=0, max_tokens=9)
    assert greedy.choices[0].message.content == alone(compiled, PROMPT, choice, max_new_tokens=9, **GREEDY)
    assert greedy.usage and (greedy.usage.prompt_tokens, greedy.usage.completion_tokens) == (5, 9)
    drawn = client.chat.completions.create(
        model=model, messages=CHAT, temperature=0.9, top_p=0.8, seed=5, n=2, max_completion_tokens=9
    )
    expected = [alone(compiled, PROMPT, choice, max_new_tokens=9, seed=seed, **DRAWN) for seed in (5, 6)]
    assert [one.message.content for one in drawn.choices] == expected
    assert {one.finish_reason for one in drawn.choices} <= {"length", "stop"}


def test_a_stream_gives_the_same_in_parts(client: openai.OpenAI, compiled: Any) -> None:
    events = list(
        client.chat.completions.create(
            model="two",
            messages=CHAT,
            temperature=0.9,
            top_p=0.8,
            seed=5,
            n=2,
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = ["", ""]
    for event in events:
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [alone(compiled, PROMPT, "two", max_new_tokens=9, seed=seed, **DRAWN) for seed in (5, 6)]
    assert events[-1].usage is not None
    assert len(events) > 9


def test_prompts_are_continued_each_with_its_choice(client: openai.OpenAI, compiled: Any) -> None:
    prompts, choices = ["Once", "upon a"], ["one", {"two": 0.5}]
    found = client.completions.create(
        model="base", prompt=prompts, temperature=0, max_tokens=7, extra_body={"adapters": choices}
    )
    expected = [
        alone(compiled, prompt, choice, max_new_tokens=7, **GREEDY)
        for prompt, choice in zip(prompts, choices, strict=True)
    ]
    assert [one.text for one in found.choices] == expected
    ids = compiled.tokenizer(prompts[0])["input_ids"]
    by_ids = client.completions.create(model="one", prompt=ids, temperature=0, max_tokens=7)
    assert by_ids.choices[0].text == expected[0]


@pytest.mark.medium("runtime/scheduling/test_scheduler.py: each request matches a single run")
def test_requests_at_once(url: str, compiled: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str | None:
        answer = await client.chat.completions.create(
            model=["base", "one", "two"][seed % 3], messages=CHAT, temperature=0.9, top_p=0.8, seed=seed, max_tokens=6
        )
        return answer.choices[0].message.content

    async def ask_all() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(12)))

    choices = [None, "one", "two"]
    expected = [alone(compiled, PROMPT, choices[s % 3], seed=s, max_new_tokens=6, **DRAWN) for s in range(12)]
    assert asyncio.run(ask_all()) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_is_never_shown(client: openai.OpenAI, compiled: Any, stream: bool) -> None:
    whole = alone(compiled, PROMPT, "one", max_new_tokens=20, **GREEDY)
    stop = whole[7:10]
    options: Any = {"model": "one", "messages": CHAT, "temperature": 0, "max_tokens": 20, "stop": [stop, "never"]}
    if stream:
        events = [event.choices[0] for event in client.chat.completions.create(stream=True, **options)]
        text, reason = "".join(event.delta.content or "" for event in events), events[-1].finish_reason
    else:
        choice = client.chat.completions.create(**options).choices[0]
        text, reason = choice.message.content or "", choice.finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")


def test_log_probabilities_are_the_models(client: openai.OpenAI, compiled: Any) -> None:
    answer = client.chat.completions.create(
        model="one", messages=CHAT, temperature=0, max_tokens=3, logprobs=True, top_logprobs=2
    )
    found = answer.choices[0].logprobs
    assert found is not None and found.content is not None
    ids = compiled.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = compiled(input_ids=ids, adapters="one").logits[0, -1].log_softmax(-1).topk(2)
    first = found.content[0]
    assert [one.token for one in first.top_logprobs] == [compiled.tokenizer.decode([i]) for i in expected.indices]
    assert first.logprob == first.top_logprobs[0].logprob
    assert "".join(one.token for one in found.content) == answer.choices[0].message.content
    legacy = client.completions.create(model="one", prompt=PROMPT, temperature=0, max_tokens=3, logprobs=2).choices[0]
    assert legacy.logprobs is not None and legacy.logprobs.tokens == [one.token for one in found.content]


def test_curl(url: str, compiled: Any) -> None:
    fields = {"model": "one", "messages": CHAT, "temperature": 0, "max_tokens": 5, "stream": True}
    command = ["curl", "-sN", f"{url}/v1/chat/completions", "-H", "content-type: application/json", "-d", "@-"]
    done = subprocess.run(command, input=json.dumps(fields), capture_output=True, text=True, check=True)
    *events, last, empty = done.stdout.split("\n\n")
    assert (last, empty) == ("data: [DONE]", "")
    parts = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    text = "".join(part.get("content", "") for part in parts)
    assert text == alone(compiled, PROMPT, "one", max_new_tokens=5, **GREEDY)


def test_models_are_the_base_and_its_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["base", "one", "two"]
    assert [client.models.retrieve(name).parent for name in ("one", "two")] == ["base", "base"]  # type: ignore[attr-defined]  # vLLM's
    with pytest.raises(openai.NotFoundError, match="'three'"):
        client.models.retrieve("three")


def test_tokens_and_the_version_are_given_as_by_vllm(url: str, compiled: Any) -> None:
    ids = compiled.tokenizer(PROMPT)["input_ids"]
    expected = {"count": len(ids), "max_model_len": 64, "tokens": ids}
    for fields in ({"prompt": PROMPT}, {"messages": CHAT}):
        assert httpx2.post(f"{url}/tokenize", json={"model": "one", **fields}).json() == expected
    for fields in ({}, {"prompt": PROMPT, "messages": CHAT}):
        assert httpx2.post(f"{url}/tokenize", json=fields).status_code == 400
    assert httpx2.get(f"{url}/version").json() == {"version": lorac.__version__}
    assert httpx2.head(f"{url}/health").status_code == 200
