"""Parse a chat's answer into content, reasoning and tool calls, by transformers' parser."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TypeAlias, final

from lorac.argument_types import JsonMapping
from lorac.serving.tokenizer import FastTokenizer

Event: TypeAlias = JsonMapping
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names that response templates give to the reasoning."""


@dataclass(frozen=True)
class ToolCall:
    """A tool call of the model.

    Attributes:
        arguments: the arguments as JSON text.
    """

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedText:
    """A part of an answer.

    Attributes:
        content: the text for the reader.
        reasoning: the model's reasoning before the content.
        calls: the tool calls.
    """

    content: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.calls)

    def joined(self, *others: "ParsedText") -> "ParsedText":
        """Concatenate this part and later parts."""
        parts = (self, *others)
        content, reasoning = "".join(part.content for part in parts), "".join(part.reasoning for part in parts)
        return ParsedText(content, reasoning, tuple(call for part in parts for call in part.calls))


def find_response_template(tokenizer: FastTokenizer, model_type: str) -> JsonMapping | None:
    """Return the tokenizer's response template, else transformers' default for the model type, else None.

    The defaults are in transformers' server, behind an undocumented function.
    """
    from transformers.cli.serving import utils

    model = SimpleNamespace(config=SimpleNamespace(model_type=model_type))
    template: JsonMapping | None = utils.get_response_template(tokenizer, model)  # type: ignore[arg-type]  # reads no more
    return template


@final
class ChatParser:
    """Parser of an answer's text, special tokens included, as it comes.

    Args:
        tokenizer: makes transformers' parser.
        template: the response template (``find_response_template``).
        prompt: the text before the answer; it may end with the beginning of the answer's format.
        tools: the tools that the answer may call.
    """

    def __init__(
        self, tokenizer: FastTokenizer, template: JsonMapping, prompt: str, tools: Sequence[JsonMapping]
    ) -> None:
        self._parser = tokenizer.get_response_parser(template, prefix=prompt, tools=tools or None)
        self._unread, self._failed = "", False

    def add(self, text: str) -> ParsedText:
        """Parse the next piece of the text; a tool call that cannot be parsed becomes content."""
        if self._failed:
            return ParsedText(text)
        try:
            return self._read(self._parser.feed(text))
        except ValueError:
            self._failed = True
            return ParsedText(self._unread + text)

    def end(self) -> ParsedText:
        """Finish parsing at the end of the text."""
        if self._failed:
            return ParsedText()
        try:
            return self._read(self._parser.finalize()[1])
        except ValueError:  # the text ends within a call
            return ParsedText(self._unread)

    def _read(self, events: Sequence[Event]) -> ParsedText:
        parsed = ParsedText()
        for event in events:
            is_unread = event["type"] == "region_chunk" and event["dirty"]
            self._unread = self._unread + event["text"] if is_unread else ""
            if event["type"] == "region_chunk" and not event["dirty"]:
                field, text = event["field"], event["text"]
                content = text if field == "content" else ""
                parsed = parsed.joined(ParsedText(reasoning=text) if field in REASONING_FIELDS else ParsedText(content))
            elif event["type"] == "region_close" and event["field"] == "tool_calls":
                values = event["value"] if isinstance(event["value"], list) else [event["value"]]
                functions = [value["function"] for value in values]
                calls = tuple(_make_call(function["name"], function["arguments"]) for function in functions)
                parsed = parsed.joined(ParsedText(calls=calls))
        return parsed


@final
class CallReader:
    """Parser of an answer that a grammar restricts to one tool call in JSON."""

    def __init__(self) -> None:
        self._text = ""

    def add(self, text: str) -> ParsedText:
        """Add a piece of the text; ``end`` parses the whole."""
        self._text += text
        return ParsedText()

    def end(self) -> ParsedText:
        """Parse the text; a truncated call becomes content."""
        try:
            call, _ = json.JSONDecoder().raw_decode(self._text)
        except ValueError:
            return ParsedText(self._text)
        return ParsedText(calls=(_make_call(call["name"], call["arguments"]),))


def _make_call(name: str, arguments: object) -> ToolCall:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return ToolCall(f"call_{uuid.uuid4().hex[:24]}", name, text)
