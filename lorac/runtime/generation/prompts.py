"""Prompts: the rows of a batch as the caller gave them, and as generation takes them, padded on the left.

A row is the sequence of its tokens, in any columns; the mask marks padding. transformers generates from rows whose
last column is a token. So rows that are padded on the right, or between tokens, are rearranged here, and the generated
tokens are appended to the rows as the caller gave them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorac.errors import InputMismatch, WrongType, short
from lorac.ir.slots.prefix import IDS, MASK

CACHE = "cache"
"""transformers' name for a cache."""


def main_input(names: Sequence[str]) -> str:
    """Return the main input of an encoder: the first name that is not a mask's."""
    return next((name for name in names if not name.endswith("mask")), names[0])


@dataclass(frozen=True, eq=False)
class Prompts:
    """The rows of a batch.

    Attributes:
        given: token ids (rows, length) as the caller gave them.
        ids: the same ids, the padding of each row moved to its left.
        mask: (rows, length), 1 where ``ids`` is a token; None where nothing is padding.
        order: (rows, length), the column in ``given`` of each id in ``ids``; None where nothing was moved.
    """

    given: Tensor
    ids: Tensor
    mask: Tensor | None
    order: Tensor | None

    @classmethod
    def of(cls, ids: object, mask: object, pad: int | None, ends: Iterable[int]) -> "Prompts":
        """Return the prompts of a call.

        Args:
            ids: token ids, a tensor or an array.
            mask: 1 for tokens; None: derived from ``pad`` where that is given and not in ``ends``, else all ones.
            pad: the id of padding, or None.
            ends: ids that end a sequence.

        Raises:
            WrongType: an argument is not a batch of ids.
            InputMismatch: a row is empty, or the mask has another shape.
        """
        given = _token_batch(ids, IDS).long()
        if mask is None and pad is not None and pad not in set(ends):
            mask = given.ne(pad).long()
        is_token = torch.ones_like(given) if mask is None else _token_batch(mask, MASK).ne(0).long()
        if is_token.shape != given.shape:
            raise InputMismatch(
                f"attention_mask has the shape {tuple(is_token.shape)}, and input_ids {tuple(given.shape)}",
                next_step="give one of the same shape, 1 for each token",
            )
        if is_token.shape[0] == 0:
            raise InputMismatch("the batch of prompts has no row", next_step="give one prompt or more")
        counts = is_token.sum(1).tolist()
        if 0 in counts:
            raise InputMismatch(
                f"row {counts.index(0)} of the prompts is empty",
                next_step="begin it with a token, such as the tokenizer's bos_token_id",
            )
        if bool(is_token.all()):
            return cls(given, given, None, None)
        order = is_token.argsort(dim=1, stable=True)
        moved = not torch.equal(is_token.sort(dim=1).values, is_token)
        arranged = given.gather(1, order) if moved else given
        return cls(given, arranged, is_token.gather(1, order), order if moved else None)

    @property
    def counts(self) -> list[int]:
        """The number of tokens of each row."""
        rows, length = self.ids.shape
        return [length] * rows if self.mask is None else self.mask.sum(1).tolist()

    def rows(self, rows: Sequence[int]) -> "Prompts":
        """Select some of the rows; the number of columns stays."""
        index = list(rows)
        mask, order = (None if t is None else t[index] for t in (self.mask, self.order))
        given = self.given[index]
        ids = given if self.ids is self.given else self.ids[index]
        return Prompts(given, ids, None if mask is None or bool(mask.all()) else mask, order)

    def arrange(self, value: object) -> object:
        """Rearrange an input with one value per token in the order of ``ids``; return other inputs unchanged."""
        if not isinstance(value, Tensor) or value.shape != self.given.shape:
            return value
        moved = value if self.order is None else value.gather(1, self.order)
        return moved[:, self.given.shape[1] - self.ids.shape[1] :]

    def trim(self) -> "Prompts":
        """Return a copy without the columns in which no row has a token."""
        spare = self.ids.shape[1] - max(self.counts)
        if not spare or self.mask is None:
            return self
        mask = self.mask[:, spare:]
        return Prompts(self.given, self.ids[:, spare:], None if bool(mask.all()) else mask, self.order)

    def tokens(self, ids: Tensor | None = None) -> list[Tensor]:
        """Return each row's tokens without padding, or the tokens of sequences that begin with the prompts.

        Args:
            ids: (rows · k, length or more), k neighbouring sequences for each row.
        """
        sequences = self.ids if ids is None else ids
        copies = sequences.shape[0] // self.ids.shape[0]
        starts = [self.ids.shape[1] - count for count in self.counts for _ in range(copies)]
        return [row[start:] for row, start in zip(sequences, starts, strict=True)]

    def restore(self, sequences: Tensor) -> Tensor:
        """Return sequences (rows · k, …) with their first columns, ``ids``, replaced by ``given``."""
        if self.order is None and self.ids is self.given:
            return sequences
        given = self.given.to(sequences.device)
        copies = sequences.shape[0] // given.shape[0]
        return torch.cat([given.repeat_interleave(copies, 0), sequences[:, self.ids.shape[1] :]], 1)


def _token_batch(value: object, name: str) -> Tensor:
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    if not isinstance(tensor, Tensor):
        shown = short(value)
    elif tensor.dim() == 2 and (name == MASK or not (tensor.is_floating_point() or tensor.dtype == torch.bool)):
        return tensor
    else:
        shown = f"{tuple(tensor.shape)} of {tensor.dtype}"
    raise WrongType(
        f"{name}= is not a batch of tokens: {shown}",
        next_step="give (rows, length), such as a tokenizer makes with return_tensors='pt'",
    )
