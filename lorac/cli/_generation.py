"""Text generation: printed while it runs, and timed."""

from __future__ import annotations

import io
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, final

import torch

from lorac.errors import InputMismatch, OptionError
from lorac.frontend.components import MAIN_GRAPH
from lorac.ir.calls.modalities import find_modality
from lorac.progress import step
from lorac.runtime.generation.prompt_cache import PromptCache
from lorac.storage.paths import translate_os_errors

if TYPE_CHECKING:
    from lorac.session.compiled import Compiled

Encoding: TypeAlias = Mapping[str, torch.Tensor]
_REPLACEMENT_CHARACTER = "\ufffd"
"""The decoded form of an incomplete character."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that commands use."""

    def __call__(self, text: str, *, return_tensors: str) -> Encoding: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def apply_chat_template(self, turns: Sequence[Mapping[str, object]], **options: object) -> Encoding: ...


class TextStreamer:
    """A streamer that passes on text as soon as its characters are complete.

    Args:
        tokenizer: decodes token ids.
        show: receives each piece of text.

    Attributes:
        text: the text so far.
    """

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], object]) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._ids: list[int] | None = None
        self.text = ""

    @property
    def tokens(self) -> int:
        """The number of tokens so far."""
        return len(self._ids or ())

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt, which comes first, or the next tokens."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += value.flatten().tolist()
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if not whole.endswith(_REPLACEMENT_CHARACTER):
            self._pass_on(whole)

    def end(self) -> None:
        """Pass on the rest, complete or not."""
        self._pass_on(self._tokenizer.decode(self._ids or [], skip_special_tokens=True))

    def _pass_on(self, whole: str) -> None:
        new, self.text = whole[len(self.text) :], whole
        if new:
            self._show(new)


@final
class TextWriter:
    """A model that writes text, with the settings of a command line; other settings are the model's own.

    Args:
        compiled: the model.
        max_new_tokens: the longest answer.
        temperature: 0 takes the best token; None: the model's own setting.

    Raises:
        OptionError: the model has no tokenizer.
    """

    def __init__(self, compiled: Compiled, max_new_tokens: int, temperature: float | None) -> None:
        if compiled.tokenizer is None:
            raise OptionError(
                "the model has no tokenizer",
                next_step="save it into the same folder, or have the function return (model, tokenizer)",
            )
        self.compiled, self.max_new_tokens, self.settings = compiled, max_new_tokens, dict[str, Any]()
        cache = compiled.engine.cache_spec(MAIN_GRAPH)
        if cache is not None and not cache.encodes:
            self.settings["prompt_cache"] = PromptCache()  # a turn of a chat need not read the turns before it again
        if temperature is not None:
            self.settings |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.compiled.tokenizer

    def encode(self, text: str) -> Encoding:
        """Return a text as inputs of the model."""
        return dict(self.tokenizer(text, return_tensors="pt"))

    def encode_images(self, text: str, paths: Sequence[Path]) -> Encoding:
        """Return a text about images as inputs: as a turn, if the model's processor has a chat template.

        Raises:
            OptionError: the model reads no images, or a file cannot be read.
            FormatError: a file is no image, or too large for a request of a server.
            InputMismatch: the processor fails.
        """
        processor = self.compiled.processor
        if getattr(processor, "image_processor", None) is None:
            raise OptionError(
                "the model has no processor for images",
                next_step="save it into the same folder, or leave --image out",
            )
        images = _read_images(paths)
        if not processor.chat_template:
            hint = "write the prompt as the processor takes it, with its token for each image"
            return _translate_failure(
                "processor", hint, lambda: processor(images=images, text=text, return_tensors="pt")
            )
        parts = [{"type": "image", "image": image} for image in images]
        return self.encode_turns([{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], processor)

    def encode_turns(self, turns: Sequence[Mapping[str, object]], reader: Tokenizer | None = None) -> Encoding:
        """Return a conversation as inputs of the model, in its chat format.

        Args:
            reader: the model's processor, for turns with images.

        Raises:
            InputMismatch: the chat template fails.
        """
        options = {"add_generation_prompt": True, "tokenize": True, "return_tensors": "pt", "return_dict": True}
        apply = (reader or self.tokenizer).apply_chat_template
        hint = '--prompt "TEXT" continues a text' if reader is None else "give as many images as the template takes"
        return _translate_failure("chat template", hint, lambda: apply(list(turns), **options))

    def positions_left(self, inputs: Encoding) -> int | None:
        """Return how many tokens the model can add to a text; None: no limit."""
        cache = self.compiled.engine.cache_spec(MAIN_GRAPH)
        left = None if cache is None or cache.encodes else cache.after(int(inputs["input_ids"].shape[1]))
        return None if left is None else max(left, 0)

    def write(self, inputs: Encoding, streamer: TextStreamer) -> None:
        """Continue a text, up to the model's last position."""
        read = inputs if find_modality(inputs) else ("input_ids", "attention_mask")
        known: dict[str, Any] = {name: inputs[name] for name in read if name in inputs}
        left = self.positions_left(inputs)
        new = self.max_new_tokens if left is None else min(self.max_new_tokens, max(left, 1))
        self.compiled.generate(**known, **self.settings, max_new_tokens=new, streamer=streamer)


def _read_images(paths: Sequence[Path]) -> list[object]:
    """Return the images in files, which are as many and as large as a request of a server may have."""
    from lorac.serving.settings import ServingSettings
    from lorac.serving.store.reading_main import IMAGE_FORMATS, read_images

    most, nbytes = ServingSettings(), 0
    for path in paths:
        with translate_os_errors(path, OptionError, "read"):
            nbytes += path.stat().st_size
    if len(paths) > most.max_images or nbytes > most.max_image_bytes:
        raise OptionError(
            f"--image gives {len(paths)} files of {nbytes} bytes in all, and a prompt takes at most {most.max_images} "
            f"files and {most.max_image_bytes} bytes",
            next_step="give fewer or smaller files",
        )
    return list(read_images([(path, f"'{path}'", (*IMAGE_FORMATS.values(),)) for path in paths], most.max_image_pixels))


def _translate_failure(program: str, next_step: str, encode: Callable[[], Encoding]) -> Encoding:
    try:
        return dict(encode())
    except Exception as error:  # a program of the model's author may raise anything
        raise InputMismatch(
            f"the model's {program} fails: {str(error).strip().partition(chr(10))[0]}",
            next_step=next_step,
        ) from error


def replace_undecodable_text() -> None:
    """Replace characters that the terminal cannot decode or encode, instead of failing."""
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


EACH_ROW_ITS_OWN = "each row its own"


def time_choices(
    compiled: Compiled,
    rounds: int,
    measure: Callable[..., tuple[float, ...]],
    own: Sequence[str] = (),
    *,
    settle: bool = False,
) -> dict[str | None, list[float]]:
    """Time swaps and calls without adapters, with each adapter, and with an adapter per row; return medians by choice.

    The first median is of the swap in seconds, the others of the results of ``measure``. A warm-up round runs first.

    Args:
        measure: measures a call; it takes ``adapters=`` of the call.
        own: an adapter for each row of a further call, which is measured too; empty: no such call.
        settle: as ``Compiled.swap`` takes it.
    """
    times: dict[str | None, list[tuple[float, ...]]] = {choice: [] for choice in (None, *compiled.adapters)}
    together: list[tuple[float, ...]] = []
    for number in range(rounds + 1):
        step(f"round {number} of {rounds}")
        for choice, found in times.items():
            found.append((compiled.swap(choice, settle=settle).seconds, *measure()))
        if own:
            together.append((compiled.swap(None, settle=settle).seconds, *measure(adapters=list(own))))
    times |= {EACH_ROW_ITS_OWN: together} if own else {}
    return {c: [statistics.median(column) for column in zip(*found[1:], strict=True)] for c, found in times.items()}


def time_generation(
    compiled: Compiled, prompt: int, new: int, rounds: int, rows: int, *, settle: bool
) -> list[dict[str, object]]:
    """Time swaps and generation with each adapter and without; return a row of medians per choice.

    Args:
        prompt: the number of tokens of the prompt.
        new: the number of new tokens.
        rounds: the number of rounds.
        rows: the number of prompts of a batch; several are also generated with the adapters in turn, one per row.
        settle: as ``Compiled.swap`` takes it.
    """
    # Ids that every vocabulary has; the time of a call does not depend on them.
    ids = (torch.arange(prompt) % 8 + 1).repeat(rows, 1)
    names = list(itertools.islice(itertools.cycle(compiled.adapters), rows if rows > 1 else 0))

    def generate(tokens: int, choice: Mapping[str, object]) -> float:
        settings: dict[str, Any] = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, **choice}
        begun = time.perf_counter()
        compiled.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        return time.perf_counter() - begun

    def measure(**choice: object) -> tuple[float, float]:
        """Return the seconds to the first token of all rows, and the seconds per further token."""
        first = generate(1, choice)
        # On a busy machine, a tiny model's first token may take longer than all of its tokens.
        return first, max(generate(new, choice) - first, 1e-9) / (new - 1)

    medians = time_choices(compiled, rounds, measure, names, settle=settle)
    return [
        {
            "adapters": choice or "none",
            "swap_ms": swap * 1e3,
            "first_ms": first * 1e3,
            "read_per_s": rows * prompt / first,
            "written_per_s": rows / each,
            "ratio": each / medians[None][2],
        }
        for choice, (swap, first, each) in medians.items()
    ]
