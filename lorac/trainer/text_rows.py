"""The rows a recipe trains on: texts of a folder, or of a set that comes with Python, as tokens with labels."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lorac.errors import ChoiceError, OptionError, nearest_name
from lorac.storage.paths import translate_os_errors

TokenRow = tuple[list[int], list[int]]
"""Tokens, and the label of each."""
TextLines = Iterator[Mapping[str, Any]]
IGNORED_LABEL = -100
"""The label that transformers' losses leave out."""
SUFFIXES = (".txt", ".md", ".jsonl")
PLAIN_KEYS, COMPLETION_KEYS, CHAT_KEYS = {"text"}, {"prompt", "completion"}, {"messages"}
SOURCE_FILES = 200


def tokenize_rows(data: str, tokenizer: Any, max_length: int) -> list[TokenRow]:
    """All rows of some data.

    Plain texts are put one after the other, parted by the tokenizer's end of text, and cut into rows of ``max_length``
    tokens, each of which counts. A prompt with its completion is a row of its own, and so is a conversation, by the
    tokenizer's chat template; there the completion counts, or the last turn. What goes beyond ``max_length`` is cut.

    Args:
        data: a folder, a file, or a name of ``BUNDLED``.
        tokenizer: transformers'.
        max_length: tokens of a row.

    Raises:
        OptionError: there is no such folder, file or set, or a line is none of the three forms.
        ChoiceError: it holds less than one row.
    """
    found = list(_build_rows(_read_lines(data), tokenizer, max_length))
    if not found:
        raise ChoiceError(
            f"'{data}' holds no row of {max_length} tokens", next_step="give more text, or a smaller max_length"
        )
    return found


def collate_rows(chosen: Sequence[TokenRow], padding: int) -> dict[str, torch.Tensor]:
    """Rows as a call's inputs, padded on the right to the longest: ``input_ids``, ``attention_mask``, ``labels``."""
    longest = max(len(tokens) for tokens, _ in chosen)

    def padded(values: Sequence[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([value + [filler] * (longest - len(value)) for value in values])

    return {
        "input_ids": padded([tokens for tokens, _ in chosen], padding),
        "attention_mask": padded([[1] * len(tokens) for tokens, _ in chosen], 0),
        "labels": padded([labels for _, labels in chosen], IGNORED_LABEL),
    }


# ── Texts ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _python_docs() -> TextLines:
    from pydoc_data.topics import topics

    return ({"text": topics[name]} for name in sorted(topics))


def _python_source() -> TextLines:
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:SOURCE_FILES]
    return ({"text": file.read_text(errors="replace")} for file in files)


BUNDLED: Mapping[str, Callable[[], TextLines]] = {"python-docs": _python_docs, "python-source": _python_source}
"""Name -> texts that are on every machine."""


def _read_lines(data: str) -> TextLines:
    if data in BUNDLED:
        return BUNDLED[data]()
    path = Path(data)
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES) if path.is_dir() else [path]
    if not path.exists() or not files:
        raise OptionError(
            f"'{data}' {'holds no ' + ', '.join(SUFFIXES) if path.is_dir() else 'is no folder, file or set'}",
            nearest=nearest_name(data, BUNDLED),
            next_step=f"give a folder of texts, or one of {', '.join(BUNDLED)}",
        )
    return chain.from_iterable(map(_read_file, files))


def _read_file(file: Path) -> TextLines:
    with translate_os_errors(file, OptionError, "read"):
        text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix != ".jsonl":
        yield {"text": text}
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield _parse_line(line, f"'{file}', line {number}")


def _parse_line(line: str, where: str) -> Mapping[str, Any]:
    try:
        said = json.loads(line)
    except json.JSONDecodeError as error:
        raise OptionError(f"{where} is no JSON: {error}", next_step="give one object a line") from error
    if not isinstance(said, dict) or not any(form <= said.keys() for form in (PLAIN_KEYS, COMPLETION_KEYS, CHAT_KEYS)):
        raise OptionError(
            f"{where} has none of the keys there are", next_step="give text, or prompt and completion, or messages"
        )
    return said


# ── Tokens ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _build_rows(lines: TextLines, tokenizer: Any, max_length: int) -> Iterator[TokenRow]:
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    running: list[int] = []
    for line in lines:
        if line.keys() >= PLAIN_KEYS:
            running += [*_tokenize(tokenizer, line["text"]), *end]
            whole = len(running) // max_length
            cut = (running[row * max_length : (row + 1) * max_length] for row in range(whole))
            yield from ((tokens, tokens) for tokens in cut)
            running = running[whole * max_length :]
            continue
        prompt, completion = _split_completion(line, tokenizer, end)
        tokens = [*prompt, *completion][:max_length]
        counted = [*[IGNORED_LABEL] * len(prompt), *completion][:max_length]
        if any(label != IGNORED_LABEL for label in counted):
            yield tokens, counted


def _split_completion(line: Mapping[str, Any], tokenizer: Any, end: list[int]) -> tuple[list[int], list[int]]:
    """Split a row into prompt tokens and completion tokens."""
    if line.keys() >= COMPLETION_KEYS:
        return _tokenize(tokenizer, line["prompt"]), [*_tokenize(tokenizer, line["completion"]), *end]
    *before, _ = line["messages"]
    prompt = _tokenize(tokenizer, tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
    whole = _tokenize(tokenizer, tokenizer.apply_chat_template(line["messages"], tokenize=False))
    return prompt, whole[len(prompt) :]


def _tokenize(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
