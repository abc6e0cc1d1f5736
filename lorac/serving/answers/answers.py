"""Answers to a request: tokens become text while they are generated."""

import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import final

from tokenizers.decoders import DecodeStream

from lorac.runtime.scheduling.token_stream import TextToken, TokenStream
from lorac.serving.active_request import ActiveRequest
from lorac.serving.answers.chat_parsing import CallReader, ChatParser, ParsedText
from lorac.serving.answers.connection import merge_streams
from lorac.serving.metrics import ServerMetrics
from lorac.serving.refusals import DeadlinePassed
from lorac.serving.tokenizer import FastTokenizer


@final
class StopString:
    """A Knuth-Morris-Pratt search for a string in text that comes in parts: it reads each character once.

    Args:
        text: the string, not empty.

    Attributes:
        begun: the length of the longest suffix of the text so far that is a prefix of the string.
    """

    def __init__(self, text: str) -> None:
        self._text, self.begun = text, 0
        self._borders = [0]  # for each prefix: the length of its longest proper suffix that is a prefix too
        for char in text[1:]:
            self._borders.append(self._extend(self._borders[-1], char))

    def find(self, new: str) -> int | None:
        """Read new text; return the position in it where the string ends, or None if the string does not end in it."""
        for place, char in enumerate(new, 1):
            self.begun = self._extend(self.begun, char)
            if self.begun == len(self._text):
                return place
        return None

    def _extend(self, begun: int, char: str) -> int:
        """Return the length of the longest prefix with which the text ends after one more character."""
        while begun and self._text[begun] != char:
            begun = self._borders[begun - 1]
        return begun + (self._text[begun] == char)


@dataclass(frozen=True)
class AnswerPart:
    """A part of an answer: the text and log-probabilities of some tokens.

    Attributes:
        index: the answer's number in the request, from 0.
        parsed: text, reasoning and tool calls.
        tokens: the tokens, if log-probabilities are reported.
        reason: why the answer ends: "stop", "length" or "tool_calls"; empty until then.
    """

    index: int
    parsed: ParsedText
    tokens: tuple[TextToken, ...] = ()
    reason: str = ""


@final
class Answer:
    """An answer in progress: its tokens are decoded up to the first stop string, and the text is parsed.

    Text that may be the beginning of a stop string is held back.

    Args:
        stream: the answer's tokens.
        tokenizer: decodes them.
        stops: stop strings, which are left out of the text.
        parser: splits the text, special tokens included, into content, reasoning and calls; None: all is content.

    Attributes:
        stopped: whether a stop string has been found.
    """

    def __init__(
        self,
        stream: TokenStream,
        tokenizer: FastTokenizer,
        stops: Sequence[str],
        parser: ChatParser | CallReader | None,
    ) -> None:
        self.stream, self.stopped = stream, False
        self._tokenizer, self._stops, self._parser = tokenizer, [StopString(stop) for stop in stops], parser
        self._decoder = DecodeStream([], skip_special_tokens=parser is None)
        self._ids: list[int] = []
        self._decoded = self._held = ""

    def add(self, token: int) -> ParsedText:
        """Add a token, and return the new text that cannot be part of a stop string, parsed."""
        self._ids.append(token)
        return self._parse(self._take(self._decoder.step(self._tokenizer.backend_tokenizer, token) or ""))

    def end(self) -> ParsedText:
        """Return the rest at the end of the tokens: text that was held back, and incomplete characters."""
        text = ""
        if not self.stopped:
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=self._parser is None)
            text = self._take(whole.removeprefix(self._decoded) if whole.startswith(self._decoded) else "")
            text = text if self.stopped else text + self._held
        rest = self._parse(text)
        return rest if self._parser is None else rest.joined(self._parser.end())

    def _take(self, new: str) -> str:
        """Add decoded text, and return the text that cannot be part of a stop string."""
        self._decoded += new
        ends = [(stop.find(new), stop.begun) for stop in self._stops]
        found = [len(self._held) + end - length for end, length in ends if end is not None]
        self._held += new
        self.stopped = bool(found)
        certain = min(found) if found else len(self._held) - max((length for _, length in ends), default=0)
        text, self._held = self._held[:certain], "" if found else self._held[certain:]
        return text

    def _parse(self, text: str) -> ParsedText:
        return ParsedText(text) if self._parser is None else self._parser.add(text)


async def read_answers(
    request: ActiveRequest, answers: Sequence[Answer], metrics: ServerMetrics, *, has_logprobs: bool
) -> AsyncGenerator[AnswerPart]:
    """Yield the parts of a request's answers as tokens come. Closing the generator cancels the request.

    Args:
        request: gets the token counts and finish reasons.
        answers: the request's answers, which are computed together.
        metrics: lists the request as running until the generator ends.
        has_logprobs: whether log-probabilities are reported.

    Raises:
        DeadlinePassed: the server's deadline passed before an answer ended.
        LoracError: an answer could not be computed.
    """

    async def read(index: int, answer: Answer) -> AsyncGenerator[AnswerPart]:
        calls, waiting, last = False, list[TextToken](), None
        async for token in answer.stream:
            now = time.monotonic()
            metrics.count_token(request, None if last is None else now - last)
            last = now
            waiting += [token] if has_logprobs else []
            parsed = answer.add(token.id)
            calls = calls or bool(parsed.calls)
            if parsed:
                yield AnswerPart(index, parsed, tuple(waiting))
                waiting = []
            if answer.stopped:
                answer.stream.cancel()
                break
        parsed = answer.end()
        reason = "stop" if answer.stopped else answer.stream.reason
        request.reasons.append(reason)
        if reason == "deadline":
            raise DeadlinePassed("the request took longer than the server's deadline", next_step="ask for fewer tokens")
        if reason == "stop" and (calls or parsed.calls):
            reason = "tool_calls"
        yield AnswerPart(index, parsed, tuple(waiting), reason)

    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(metrics.track(request))
        for answer in answers:
            stack.callback(answer.stream.cancel)
        merged = merge_streams([read(index, answer) for index, answer in enumerate(answers)])
        await stack.enter_async_context(contextlib.aclosing(merged))
        async for part in merged:
            yield part
