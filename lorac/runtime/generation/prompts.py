"""Prompts: the rows of a batch as they were given, and as generation takes them: padded on the left.

A row is its tokens in their order, wherever they lie: what its mask leaves out is padding. transformers generates from
rows whose last column is text, so rows that are padded on the right, or within, are brought into that form here, and
what was given is put back in front of what was generated.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorac.errors import InputMismatch, WrongType, short

IDS, MASK, CACHE = "input_ids", "attention_mask", "cache"
"""What transformers calls a text, which of it is no padding, and what is kept of it."""
_EMPTY = "begin it with a token, such as the tokenizer's bos_token_id"


def main_input(names: Sequence[str]) -> str:
    """What an encoder reads, of its inputs: the first that is no mask."""
    return next((name for name in names if not name.endswith("mask")), names[0])


@dataclass(frozen=True, eq=False)
class Prompts:
    """The rows of a batch.

    Attributes:
        given: token ids (rows, length) as they came.
        ids: the same, each row's padding brought to its left.
        mask: (rows, length), 1 where ``ids`` is text; None where all of it is.
        order: (rows, length): ``ids`` is what ``given`` has at these places; None where that is all as it came.
    """

    given: Tensor
    ids: Tensor
    mask: Tensor | None
    order: Tensor | None

    @classmethod
    def of(cls, ids: Any, mask: Any, pad: int | None, ends: Iterable[int]) -> Prompts:
        """Prompts out of what a call was given.

        Args:
            ids: token ids, torch's or NumPy's.
            mask: what is text; None where it is not said: all but padding, where that can be told.
            pad: the id of padding, if there is one.
            ends: ids that end a text. Where the padding is one of them, nothing tells it from text.

        Raises:
            WrongType: what was given is no batch of ids.
            InputMismatch: there is no text in a row, or the mask has another shape.
        """
        given = _token_batch(ids, "input_ids").long()
        if mask is None and pad is not None and pad not in set(ends):
            mask = given.ne(pad).long()
        text = torch.ones_like(given) if mask is None else _token_batch(mask, "attention_mask").ne(0).long()
        if text.shape != given.shape:
            raise InputMismatch(
                f"attention_mask has the shape {tuple(text.shape)}, and input_ids {tuple(given.shape)}",
                next_step="give one of the same shape, 1 where there is text",
            )
        _refuse_empty(text)
        if bool(text.all()):
            return cls(given, given, None, None)
        order = text.argsort(dim=1, stable=True)
        moved = not torch.equal(text.sort(dim=1).values, text)
        packed = given.gather(1, order) if moved else given
        return cls(given, packed, text.gather(1, order), order if moved else None)

    @property
    def counts(self) -> list[int]:
        """How many tokens each row has."""
        rows, length = self.ids.shape
        return [length] * rows if self.mask is None else self.mask.sum(1).tolist()

    def rows(self, rows: Sequence[int]) -> Prompts:
        """Some of the rows, as wide as all of them."""
        own = list(rows)
        mask, order = (None if t is None else t[own] for t in (self.mask, self.order))
        given = self.given[own]
        ids = given if self.ids is self.given else self.ids[own]
        return Prompts(given, ids, None if mask is None or bool(mask.all()) else mask, order)

    def arranged(self, value: Any) -> Any:
        """An input that has a value for each token, with them at the places that the tokens have in ``ids``."""
        if not isinstance(value, Tensor) or value.shape != self.given.shape:
            return value
        moved = value if self.order is None else value.gather(1, self.order)
        return moved[:, self.given.shape[1] - self.ids.shape[1] :]

    def trimmed(self) -> Prompts:
        """The same without columns in which no row has text."""
        spare = self.ids.shape[1] - max(self.counts)
        if not spare or self.mask is None:
            return self
        mask = self.mask[:, spare:]
        return Prompts(self.given, self.ids[:, spare:], None if bool(mask.all()) else mask, self.order)

    def tokens(self, ids: Tensor | None = None) -> list[Tensor]:
        """Each row's tokens; of sequences that begin with the prompts, where those are given.

        Args:
            ids: (rows · k, length or more): k sequences of each row, those of a row beside each other.
        """
        whole = self.ids if ids is None else ids
        each = whole.shape[0] // self.ids.shape[0]
        starts = [self.ids.shape[1] - count for count in self.counts for _ in range(each)]
        return [row[start:] for row, start in zip(whole, starts, strict=True)]

    def put_back(self, sequences: Tensor) -> Tensor:
        """Sequences (rows · k, …) behind ``ids``, with what was given in its place."""
        if self.order is None and self.ids is self.given:
            return sequences
        given = self.given.to(sequences.device)
        each = sequences.shape[0] // given.shape[0]
        return torch.cat([given.repeat_interleave(each, 0), sequences[:, self.ids.shape[1] :]], 1)


def _token_batch(value: Any, name: str) -> Tensor:
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    wrong = not isinstance(tensor, Tensor) or (
        name == "input_ids" and (tensor.is_floating_point() or tensor.dtype == torch.bool)
    )
    if wrong or tensor.dim() != 2:
        shown = f"{tuple(tensor.shape)} of {tensor.dtype}" if isinstance(tensor, Tensor) else short(value)
        raise WrongType(
            f"{name}= is no batch of tokens: {shown}",
            next_step="give (rows, length), such as a tokenizer makes with return_tensors='pt'",
        )
    return tensor


def _refuse_empty(text: Tensor) -> None:
    if text.shape[0] == 0:
        raise InputMismatch("there is no row to generate from", next_step="give one prompt or more")
    counts = text.sum(1).tolist()
    if 0 in counts:
        row = counts.index(0)
        raise InputMismatch(f"row {row} of the prompts is empty", next_step=_EMPTY)
