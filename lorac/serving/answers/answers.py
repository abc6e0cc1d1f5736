"""The answers to a request: what each token adds to them."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import final

from lorac.runtime.scheduling.token_stream import TextToken, TokenStream
from lorac.serving.active_request import ActiveRequest
from lorac.serving.activity import Activity
from lorac.serving.answers.answer_text import AnswerText
from lorac.serving.answers.chat_parsing import ChatParser, ParsedText
from lorac.serving.answers.connection import merge_streams
from lorac.serving.refusals import DeadlinePassed


@dataclass(frozen=True)
class AnswerPart:
    """A part of an answer: the text and log-probabilities of some tokens.

    Attributes:
        index: of the answer.
        parsed: text, reasoning and calls of tools.
        tokens: the tokens, if log-probabilities are reported.
        reason: why the answer ends: "stop", "length" or "tool_calls"; empty until then.
    """

    index: int
    parsed: ParsedText
    tokens: tuple[TextToken, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer that is being computed.

    Attributes:
        stream: its tokens.
        text: makes text of them.
        parser: divides the text into what is said, thought and called; None: all is said.
    """

    stream: TokenStream
    text: AnswerText
    parser: ChatParser | None

    def add(self, token: int) -> ParsedText:
        """Return what a token adds."""
        return self._parse(self.text.add(token))

    def end(self) -> ParsedText:
        """Return what the end adds."""
        rest = self._parse(self.text.end())
        return rest if self.parser is None else rest.joined(self.parser.end())

    def _parse(self, text: str) -> ParsedText:
        return ParsedText(text) if self.parser is None else self.parser.add(text)


@final
class Answers:
    """The answers to one request.

    Args:
        request: counts its tokens.
        answers: are computed together.
        activity: knows of the request while it is read.
        has_logprobs: whether log-probabilities are reported.
    """

    def __init__(
        self, request: ActiveRequest, answers: Sequence[Answer], activity: Activity, *, has_logprobs: bool
    ) -> None:
        self.request, self.answers = request, answers
        self._activity, self._has_logprobs = activity, has_logprobs

    async def parts(self) -> AsyncGenerator[AnswerPart]:
        """Yield what tokens add to the answers, as they come. Leaving the loop ends the request.

        Raises:
            DeadlinePassed: before an answer ended.
            LoracError: an answer could not be computed.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(self._activity.track(self.request))
            for answer in self.answers:
                stack.callback(answer.stream.cancel)
            merged = merge_streams([self._read(index, answer) for index, answer in enumerate(self.answers)])
            await stack.enter_async_context(contextlib.aclosing(merged))
            async for part in merged:
                yield part

    async def _read(self, index: int, answer: Answer) -> AsyncGenerator[AnswerPart]:
        calls, waiting, last = False, list[TextToken](), None
        async for token in answer.stream:
            last = self._count(last)
            waiting += [token] if self._has_logprobs else []
            parsed = answer.add(token.id)
            calls = calls or bool(parsed.calls)
            if parsed:
                yield AnswerPart(index, parsed, tuple(waiting))
                waiting = []
            if answer.text.stopped:
                answer.stream.cancel()
                break
        parsed = answer.end()
        reason = self._end(answer, calls=calls or bool(parsed.calls))
        yield AnswerPart(index, parsed, tuple(waiting), reason)

    def _count(self, last: float | None) -> float:
        """Count a token, and return when it came."""
        now = time.monotonic()
        self._activity.count_token(self.request, None if last is None else now - last)
        return now

    def _end(self, answer: Answer, *, calls: bool) -> str:
        """Return why an answer ended, in OpenAI's words."""
        reason = "stop" if answer.text.stopped else answer.stream.reason
        self.request.reasons.append(reason)
        if reason == "deadline":
            raise DeadlinePassed("the request took longer than the server's deadline", next_step="ask for fewer tokens")
        return "tool_calls" if calls and reason == "stop" else reason
