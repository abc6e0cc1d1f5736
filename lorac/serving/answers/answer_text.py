"""Tokens of an answer as text, up to the strings that end it."""

from collections.abc import Sequence
from typing import final

from tokenizers.decoders import DecodeStream

from lorac.serving.tokenizer import FastTokenizer


@final
class AnswerText:
    """The text of an answer as its tokens come. What may yet become a stop string is held back.

    Args:
        tokenizer: decodes tokens.
        stops: strings that end the answer, and are no part of it.
        special: whether special tokens are part of the text, for a parser that looks for them.

    Attributes:
        stopped: whether one of the strings has come.
    """

    def __init__(self, tokenizer: FastTokenizer, stops: Sequence[str] = (), *, special: bool = False) -> None:
        self._tokenizer, self._stops, self._special = tokenizer, stops, special
        self._decoder = DecodeStream([], skip_special_tokens=not special)
        self._ids: list[int] = []
        self._decoded = self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Return the text that a token makes certain."""
        self._ids.append(token)
        return self._take(self._decoder.step(self._tokenizer.backend_tokenizer, token) or "")

    def end(self) -> str:
        """Return the rest of the text when no token follows: what was held back, and incomplete characters."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=not self._special)
        rest = whole.removeprefix(self._decoded) if whole.startswith(self._decoded) else ""
        text = self._take(rest)
        return text if self.stopped else text + self._held

    def _take(self, new: str) -> str:
        self._decoded += new
        self._held += new
        found = [place for place in map(self._held.find, self._stops) if place >= 0]
        self.stopped = bool(found)
        certain = min(found) if found else len(self._held) - self._begun()
        text, self._held = self._held[:certain], "" if found else self._held[certain:]
        return text

    def _begun(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        return max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])), default=0)
