"""Text that a compiled model writes: shown while it is written, and timed."""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorac.errors import InputMismatch, OptionError
from lorac.frontend.components import MAIN_GRAPH
from lorac.runtime.generation.prompt_cache import PromptCache

_REPLACEMENT_CHARACTER = "\ufffd"
"""What a tokenizer gives for the bytes of a character that is not whole yet."""


class TextStreamer:
    """A streamer: of text that has been written, whatever is whole is handed on.

    Args:
        tokenizer: makes text of ids.
        show: takes a piece of text.

    Attributes:
        text: all that was written so far.
        tokens: how many tokens that is.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], object]) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] | None = None
        self.text = ""

    @property
    def tokens(self) -> int:
        """How many tokens were written so far."""
        return len(self._ids or ())

    def put(self, value: torch.Tensor) -> None:
        """The prompt, which comes first, or what was written next."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not whole.endswith(_REPLACEMENT_CHARACTER):
            self._hand_on(whole)

    def end(self) -> None:
        """Nothing more is written: what is still half is handed on as it is."""
        self._hand_on(self._tokenizer.decode(self._ids or [], skip_special_tokens=True))

    def _hand_on(self, whole: str) -> None:
        new, self.text = whole[len(self.text) :], whole
        if new:
            self._show(new)


@dataclass(frozen=True, kw_only=True)
class TextWriter:
    """A model that writes, with the settings of a command line.

    Attributes:
        compiled: the model.
        settings: options of ``compiled.generate``.
    """

    compiled: Any
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, compiled: Any, new: int, temperature: float | None) -> TextWriter:
        """A writer with the settings that were given; what was not given is the model's own.

        Raises:
            OptionError: the model has no tokenizer.
        """
        if compiled.tokenizer is None:
            raise OptionError(
                "there is no tokenizer beside the model",
                next_step="save it into the same folder, or have the function return (model, tokenizer)",
            )
        settings: dict[str, Any] = {"max_new_tokens": new}
        keeps = compiled.engine.cache_spec(MAIN_GRAPH)
        if keeps is not None and not keeps.encodes:
            settings["prefixes"] = PromptCache()  # so that a turn of a chat does not read again what was said before
        if temperature is not None:
            settings |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        return cls(compiled=compiled, settings=settings)

    @property
    def tokenizer(self) -> Any:
        """The model's."""
        return self.compiled.tokenizer

    def encoded(self, text: str) -> Mapping[str, Any]:
        """A text as the model reads it."""
        return dict(self.tokenizer(text, return_tensors="pt"))

    def turns(self, said: Sequence[Mapping[str, str]]) -> Mapping[str, Any]:
        """What was said so far, as the model's chat format has it, up to where it is to answer.

        Raises:
            InputMismatch: the format has no way to say it.
        """
        told = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        try:
            return dict(self.tokenizer.apply_chat_template(list(said), **told))
        except Exception as error:  # a template is a program of whoever made the model, and raises what it likes
            raise InputMismatch(
                f"the model's chat template fails: {str(error).strip().partition(chr(10))[0]}",
                next_step='--prompt "TEXT" goes on with a text as it is',
            ) from error

    def write(self, inputs: Mapping[str, Any], shown: TextStreamer) -> None:
        """Go on with a text, no further than the model has positions."""
        told = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        settings = dict(self.settings)
        keeps = self.compiled.engine.cache_spec(MAIN_GRAPH)
        left = None if keeps is None or keeps.encodes else keeps.after(int(told["input_ids"].shape[1]))
        if left is not None:
            settings["max_new_tokens"] = min(settings["max_new_tokens"], max(left, 1))
        self.compiled.generate(**told, **settings, streamer=shown)


def replace_undecodable_text() -> None:
    """Have what cannot be read of the input, or shown on the output, be replaced: it ends no chat."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


class _TimestampStreamer:
    """A streamer that notes when something comes."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """The last token has been noted."""


def time_generation(compiled: Any, prompt: int, new: int, rounds: int) -> list[dict[str, Any]]:
    """Swaps, and writing with each adapter and without: medians over rounds, one row per choice.

    Args:
        compiled: the model.
        prompt: how many tokens are read.
        new: how many are written.
        rounds: how often.
    """
    # Ids that every vocabulary has; how long a call takes depends on no id.
    ids = (torch.arange(prompt) % 64 + 1)[None]
    choices: list[str | None] = [None, *compiled.adapters]

    def turn() -> dict[str | None, tuple[float, ...]]:
        return {choice: (compiled.swap(choice).seconds, *_time_tokens(compiled, ids, new)) for choice in choices}

    turn()  # for what is made once
    turns = [turn() for _ in range(rounds)]
    medians = {c: [statistics.median(each) for each in zip(*(t[c] for t in turns), strict=True)] for c in choices}
    return [
        {
            "adapters": choice or "none",
            "swap_ms": swap * 1e3,
            "first_ms": first * 1e3,
            "read_per_s": prompt / first,
            "written_per_s": 1 / each,
            "ratio": each / medians[None][2],
        }
        for choice, (swap, first, each) in medians.items()
    ]


def _time_tokens(compiled: Any, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds to the first token, and for each of the others."""
    noted, begun = _TimestampStreamer(), time.perf_counter()
    settings = {"do_sample": False, "min_new_tokens": new, "max_new_tokens": new}
    compiled.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings, streamer=noted)
    first, last = noted.moments[1], noted.moments[-1]
    return first - begun, (last - first) / (new - 1)
