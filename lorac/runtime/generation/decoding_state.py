"""Rows of a batch as a target's cache holds them and as transformers' generation asks for them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lorac.target.kv_cache import DecodeStep, KeyValueCache

ExtendCache = Callable[[KeyValueCache, DecodeStep], Tensor]
"""``BoundProgram.decode`` of one graph."""
_INITIAL_ROOM = 1024
"""Room for new tokens of a row at first, where it may get more."""


class DecodingState:
    """Rows that grow. What a row holds is what was fed of it; whoever feeds it again says all of it, or what is new.

    Args:
        cache: holds the rows.
        piece: how many tokens of a row are computed at a time; None: all.

    Attributes:
        ceiling: the longest that a row may become.
        rows: the tokens of each row, once a call that answers with them has ended.
        engine: what computed them.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: KeyValueCache, piece: int | None = None) -> None:
        self.cache, self.piece = cache, piece
        self.ceiling = cache.capacity
        self.rows: Sequence[Tensor] | None = None
        self.engine: weakref.ref[Any] | None = None

    @staticmethod
    def room(longest: int, new: int) -> int:
        """The capacity to begin with, for rows of a length that may get some new tokens."""
        return longest + min(new, _INITIAL_ROOM)

    def feed(self, extend: ExtendCache, ids: Tensor, mask: Tensor | None, keep: int) -> Tensor:
        """Add what is new of the rows; returns the logits of each row's last ``keep`` tokens (rows, keep, vocabulary).

        Args:
            extend: computes.
            ids: token ids (rows, length), padded on the left: the whole rows, or their last columns.
            mask: (rows, length of the whole rows), 1 where there is text; None where all is.
            keep: of how many tokens logits are asked for.
        """
        new = self._new(ids, mask)
        counts = [row.shape[0] for row in new]
        tokens = torch.nn.utils.rnn.pad_sequence(new, batch_first=True)
        held = self.cache.lengths
        try:
            return self._added(extend, tokens, counts, keep)
        except BaseException:
            self.cache.crop(held)
            raise

    def step(self, extend: ExtendCache, tokens: Tensor, going: Sequence[int]) -> Tensor:
        """One more token for the rows that go on; returns their logits (rows, vocabulary), zeros for the others.

        Args:
            extend: computes.
            tokens: (rows,).
            going: 1 for a row that goes on, 0 for one that brings nothing.
        """
        self._grow(going)
        logits = extend(
            self.cache, DecodeStep(ids=tokens[:, None], counts=going, wanted=torch.zeros_like(tokens[:, None]))
        )
        logits = logits[:, 0]
        if all(going):
            return logits
        return torch.where(torch.tensor(going, dtype=torch.bool)[:, None], logits, logits.new_zeros(()))

    # --- what transformers asks of a cache -------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """How many tokens the first row holds."""
        return self.cache.lengths[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every row; as transformers has it, their number is given negative."""
        if tokens_to_remove:
            self.cache.crop([length - abs(tokens_to_remove) for length in self.cache.lengths])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let the rows be these of the present ones."""
        self.select(beam_idx.tolist())

    def activate_past_recording(self) -> None:
        """What is cropped can always be fed again."""

    def select(self, rows: Sequence[int]) -> None:
        """As ``Cache.select``; does nothing where that is what the rows are."""
        if list(rows) != list(range(len(self.cache.lengths))):
            self.cache.select(rows)

    # --- growing ---------------------------------------------------------------------------------------------------

    def _new(self, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
        """The tokens of each row that the cache does not hold."""
        held, width = self.cache.lengths, ids.shape[1]
        if mask is None:
            return [row[length:] for row, length in zip(ids, held, strict=True)]
        text = mask.bool()
        before = [int(row.sum()) for row in text[:, : text.shape[1] - width]]
        shown = [row[own] for row, own in zip(ids, text[:, -width:], strict=True)]
        return [row[length - early :] for row, length, early in zip(shown, held, before, strict=True)]

    def _added(self, extend: ExtendCache, tokens: Tensor, counts: list[int], keep: int) -> Tensor:
        """All of the new tokens; those before each row's last piece are computed piece by piece."""
        self._grow(counts)
        last = max(self.piece or max(counts), keep)
        early = [max(count - last, 0) for count in counts]
        for start in range(0, max(early), self.piece or 1):
            ids = tokens[:, start : start + (self.piece or 1)]
            brings = [min(max(count - start, 0), ids.shape[1]) for count in early]
            extend(self.cache, DecodeStep(ids=ids, counts=brings, wanted=torch.zeros_like(ids[:, :1])))
        rest = [count - done for count, done in zip(counts, early, strict=True)]
        left = [row[done:count] for row, done, count in zip(tokens, early, counts, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(left, batch_first=True)
        wanted = torch.tensor(rest)[:, None] - keep + torch.arange(keep)
        return extend(self.cache, DecodeStep(ids=ids, counts=rest, wanted=wanted.clamp(min=0)))

    def _grow(self, counts: Sequence[int]) -> None:
        """Have room for some more tokens of each row."""
        needed = max(length + count for length, count in zip(self.cache.lengths, counts, strict=True))
        if needed > self.cache.capacity:
            self.cache.grow(max(needed, min(2 * self.cache.capacity, self.ceiling)))
