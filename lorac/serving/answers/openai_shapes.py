"""Answers in the form that OpenAI's clients read."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from lorac.runtime.scheduling.token_stream import TextToken
from lorac.serving.active_request import ActiveRequest
from lorac.serving.answers.answers import AnswerPart
from lorac.serving.answers.chat_parsing import ParsedText, ToolCall
from lorac.serving.tokenizer import FastTokenizer

Json = dict[str, object]
LEAST_LOGPROB = -9999.0
"""OpenAI's log-probability of a token whose probability is 0."""


class AnswerShape(ABC):
    """The form of the answers to a request.

    Args:
        request: the request.
        tokenizer: decodes tokens whose log-probabilities are reported.
        has_logprobs: whether log-probabilities are reported.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk_kind: ClassVar[str]

    def __init__(self, request: ActiveRequest, tokenizer: FastTokenizer, *, has_logprobs: bool) -> None:
        self._request, self._tokenizer, self._has_logprobs = request, tokenizer, has_logprobs

    def whole(self, parts: Sequence[AnswerPart]) -> Json:
        """Return the answers as one object."""
        choices = []
        for index in range(self._request.answers):
            own = [part for part in parts if part.index == index]
            parsed = ParsedText().joined(*(part.parsed for part in own))
            head = {"index": index, **self.message(parsed), "finish_reason": own[-1].reason}
            choices.append(head | self._logprobs([token for part in own for token in part.tokens]))
        return {**self._head(self.kind), "choices": choices, "usage": self._request.usage}

    def chunk(self, part: AnswerPart) -> Json:
        """Return a part as an event of a stream."""
        choice = {"index": part.index, **self.delta(part), "finish_reason": part.reason or None}
        return {**self._head(self.chunk_kind), "choices": [choice | self._logprobs(part.tokens)]}

    def opening(self) -> list[Json]:
        """Return the events before the first part."""
        return []

    def usage(self) -> Json:
        """Return the token counts as the last event of a stream."""
        return {**self._head(self.chunk_kind), "choices": [], "usage": self._request.usage}

    def _head(self, kind: str) -> Json:
        request = self._request
        return {"id": f"{self.prefix}-{request.id}", "object": kind, "created": request.created, "model": request.model}

    def _logprobs(self, tokens: Sequence[TextToken]) -> Json:
        return {"logprobs": self.describe_tokens(tokens) if self._has_logprobs else None}

    @abstractmethod
    def message(self, parsed: ParsedText) -> Json:
        """Return a whole answer as fields of a choice."""

    @abstractmethod
    def delta(self, part: AnswerPart) -> Json:
        """Return a part of an answer as fields of a choice."""

    @abstractmethod
    def describe_tokens(self, tokens: Sequence[TextToken]) -> Json:
        """Return tokens with their log-probabilities."""

    def _decode(self, token: int) -> str:
        return self._tokenizer.decode([token])


@final
class ChatShape(AnswerShape):
    """The form of a chat's answers."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, request: ActiveRequest, tokenizer: FastTokenizer, *, has_logprobs: bool) -> None:
        super().__init__(request, tokenizer, has_logprobs=has_logprobs)
        self._calls: dict[int, int] = {}

    def opening(self) -> list[Json]:
        choice = {"delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}
        head = self._head(self.chunk_kind)
        return [{**head, "choices": [{"index": index, **choice}]} for index in range(self._request.answers)]

    def message(self, parsed: ParsedText) -> Json:
        calls = [_describe_call(call) for call in parsed.calls]
        more: Mapping[str, object] = {"reasoning_content": parsed.reasoning, "tool_calls": calls}
        content = parsed.content if parsed.content or not calls else None
        return {"message": {"role": "assistant", "content": content, **{k: v for k, v in more.items() if v}}}

    def delta(self, part: AnswerPart) -> Json:
        first = self._calls.get(part.index, 0)
        calls = [{"index": i, **_describe_call(call)} for i, call in enumerate(part.parsed.calls, first)]
        self._calls[part.index] = first + len(calls)
        parsed = part.parsed
        delta = {"content": parsed.content, "reasoning_content": parsed.reasoning, "tool_calls": calls}
        return {"delta": {name: value for name, value in delta.items() if value}}

    def describe_tokens(self, tokens: Sequence[TextToken]) -> Json:
        return {"content": [self._describe_token(token) for token in tokens]}

    def _describe_token(self, token: TextToken) -> Json:
        likeliest = [self._describe_logprob(id, logprob) for id, logprob in token.likeliest]
        return {**self._describe_logprob(token.id, token.logprob), "top_logprobs": likeliest}

    def _describe_logprob(self, token: int, logprob: float | None) -> Json:
        text = self._decode(token)
        encoded = None if "\ufffd" in text else list(text.encode())  # the token is a part of a character
        return {"token": text, "logprob": _bounded(logprob), "bytes": encoded}


@final
class CompletionShape(AnswerShape):
    """The form of a completion's answers."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def message(self, parsed: ParsedText) -> Json:
        return {"text": parsed.content}

    def delta(self, part: AnswerPart) -> Json:
        return {"text": part.parsed.content}

    def describe_tokens(self, tokens: Sequence[TextToken]) -> Json:
        texts = [self._decode(token.id) for token in tokens]
        likeliest = [{self._decode(id): _bounded(logprob) for id, logprob in token.likeliest} for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [_bounded(token.logprob) for token in tokens],
            "top_logprobs": likeliest,
            "text_offset": [*itertools.accumulate(map(len, texts), initial=0)][:-1],
        }


def _bounded(logprob: float | None) -> float:
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)


def _describe_call(call: ToolCall) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
