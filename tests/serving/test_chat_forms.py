"""Answers that call tools, that think first, and that must be JSON."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, Literal

import openai
import pydantic
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models

import lorac
from lorac.serving.answers.chat_parsing import ChatParser, ParsedText, find_response_template
from lorac.serving.requests.grammar import Grammars
from tests.decoders import VOCABULARY
from tests.serving.models import alone, make_app, make_tokenizer, serve

CHAT: Any = [{"role": "user", "content": "Say"}]
PROMPT = "uSay;"
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["lora", "dora"]}, "rank": {"type": "integer", "minimum": 1, "maximum": 64}},
    "required": ["kind", "rank"],
    "additionalProperties": False,
}
FORM: Any = {"type": "json_schema", "json_schema": {"name": "adapter", "schema": SCHEMA}}


def template(called: str, ended: str) -> dict[str, Any]:
    """A response template in which a call stands between two strings, with a name that is always f."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"text": "{content}"}}}
    field = {"open": called, "close": ended, "repeats": True, "content": "text", "transform": call}
    return {"start_anchor": ";", "fields": {"tool_calls": field, "content": {"content": "text", "close": "</s>"}}}


@pytest.fixture(scope="module")
def calling(compiled: Any, url: str) -> Iterator[Any]:
    """A client of a server whose model's answer holds a call; that answer. The shared server has started before."""
    answer = alone(compiled, PROMPT, "one", max_new_tokens=12, do_sample=False)
    before, compiled.tokenizer = compiled.tokenizer, make_tokenizer()
    compiled.tokenizer.response_template = template(answer[2:4], answer[7:9])
    app = make_app(compiled)
    with serve(app) as own, openai.OpenAI(base_url=f"{own}/v1", api_key="any", max_retries=0) as client:
        yield client, answer
    compiled.tokenizer = before


def test_an_answer_calls_a_tool(calling: Any) -> None:
    client, answer = calling
    options = {"model": "one", "messages": CHAT, "tools": TOOLS, "temperature": 0, "max_tokens": 12}
    message = client.chat.completions.create(**options).choices[0].message
    (call,) = message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("f", {"text": answer[4:7]})
    assert message.content == answer[:2] + answer[9:]
    deltas = [event.choices[0].delta for event in client.chat.completions.create(stream=True, **options)]
    (streamed,) = [call for delta in deltas for call in delta.tool_calls or ()]
    assert (streamed.index, streamed.function.model_dump()) == (0, call.function.model_dump())
    assert "".join(delta.content or "" for delta in deltas) == message.content
    turns = [*CHAT, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "42"}]
    assert client.chat.completions.create(**{**options, "messages": turns}).choices[0].message.content is not None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes<think>why</think>", ParsedText("Yes", "why")),
        ("<tool_call>{'broken</tool_call> on", ParsedText("{'broken")),
        ('a<tool_call>{"name": "f"', ParsedText('a{"name": "f"')),
    ],
)
def test_answers_are_parsed_as_transformers_knows_a_kind_of_model(text: str, expected: ParsedText) -> None:
    tokenizer = make_tokenizer()
    known = find_response_template(tokenizer, "qwen3")
    assert known is not None and find_response_template(tokenizer, "llama") is None
    parser, found = ChatParser(tokenizer, known, "<|im_start|>assistant\n", TOOLS), ParsedText()
    for place in range(0, len(text), 5):
        found = found.joined(parser.add(text[place : place + 5]))
    found = found.joined(parser.end())
    assert (found.reasoning, found.calls) == (expected.reasoning, ())
    assert found.content.startswith(expected.content)


def test_transformers_still_finds_a_response_template() -> None:
    """Its function reads the model's kind alone, and the tokenizer's own template comes first."""
    assert find_response_template(SimpleNamespace(response_template={"a": 1}), "qwen3") == {"a": 1}  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [1, 2])
def test_an_answer_is_json_of_a_schema(client: openai.OpenAI, compiled: Any, seed: int) -> None:
    answer = client.chat.completions.create(
        model="one", messages=CHAT, seed=seed, temperature=0.7, max_tokens=40, response_format=FORM
    )
    mask = Grammars(compiled.tokenizer, VOCABULARY, [2]).processor(SCHEMA, len(PROMPT))
    options = {"do_sample": True, "temperature": 0.7, "top_k": 0, "max_new_tokens": 40}
    text = alone(compiled, PROMPT, "one", seed=seed, logits_processor=[mask], **options)
    assert answer.choices[0].message.content == text
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(text)
    assert found["kind"] in ("lora", "dora") and 1 <= found["rank"] <= 64


class Size(pydantic.BaseModel, extra="forbid"):
    r: Literal[4, 8]


class Adapter(pydantic.BaseModel, extra="forbid"):
    s: Size


def ask_for_call(client: openai.OpenAI, choice: Any, **options: Any) -> Any:
    tools: Any = [*TOOLS, openai.pydantic_function_tool(Adapter, name="A")]
    given = {"model": "one", "messages": CHAT, "seed": 3, "temperature": 0.7, "max_tokens": 40, **options}
    return client.chat.completions.create(tools=tools, tool_choice=choice, parallel_tool_calls=False, **given)


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_call_fits_the_schema_of_its_tool(client: openai.OpenAI, stream: bool) -> None:
    choice = {"type": "function", "function": {"name": "A"}}
    answer = ask_for_call(client, choice, stream=stream)
    if stream:
        found = [event.choices[0] for event in answer]
        calls, reason = [call for part in found for call in part.delta.tool_calls or ()], found[-1].finish_reason
    else:
        calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
    ((name, arguments),) = [(call.function.name, call.function.arguments) for call in calls]
    assert (name, reason) == ("A", "tool_calls")
    assert Adapter.model_validate_json(arguments).s.r in (4, 8)


def test_a_required_call_is_of_any_tool_and_one_that_is_cut_off_is_text(client: openai.OpenAI) -> None:
    (call,) = ask_for_call(client, "required").choices[0].message.tool_calls
    assert call.function.name in ("f", "A")
    cut = ask_for_call(client, "required", max_tokens=3).choices[0]
    assert (cut.message.content[0], cut.message.tool_calls, cut.finish_reason) == ("{", None, "length")


def test_a_grammar_goes_on_in_another_process(compiled: Any) -> None:
    """A worker of a cluster gets a mask before its first token, and may get part of the answer with it."""
    grammars, prompt = Grammars.of(compiled), compiled.tokenizer("Say")["input_ids"]
    mask = grammars.processor({"type": "object"}, len(prompt))
    sent = pickle.dumps(mask)
    text, scores = torch.tensor([prompt]), torch.zeros(1, VOCABULARY)
    for token in compiled.tokenizer('{"a":')["input_ids"]:
        mask(text, scores)
        text = torch.cat([text, torch.tensor([[token]])], 1)
    moved = pickle.loads(sent)
    grammars.bind(moved)
    expected = mask(text, scores)
    assert torch.equal(moved(text, scores), expected) and expected.isinf().any()


def test_rejects_a_tokenizer_that_the_grammar_cannot_read_by_name() -> None:
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(lorac.LoracError, match="'response_format' is not supported"):
        Grammars(transformers.PreTrainedTokenizerFast(tokenizer_object=words), 1, [])


def test_every_choice_follows_the_response_format(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    answer = client.chat.completions.create(
        model="base", messages=CHAT, seed=1, n=3, temperature=1.5, max_tokens=8, response_format=form
    )
    assert all((choice.message.content or "{").lstrip().startswith("{") for choice in answer.choices)


def test_penalties_count_the_tokens_of_the_answer(client: openai.OpenAI, compiled: Any) -> None:
    options: Any = {"model": "one", "messages": CHAT, "temperature": 0, "max_tokens": 30}
    bias = {"logit_bias": {"40": 12}}
    plain = client.chat.completions.create(**options, **bias).choices[0].message.content or ""
    once = client.chat.completions.create(**options, **bias, presence_penalty=2, frequency_penalty=2)
    letter = compiled.tokenizer.decode([40])
    assert plain.count(letter) > (once.choices[0].message.content or "").count(letter) > 0
