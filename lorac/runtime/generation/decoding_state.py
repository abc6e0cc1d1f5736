"""The rows of a batch over a target's cache, with the methods that transformers' generation calls on a cache."""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lorac.ir.calls.modalities import leave_block
from lorac.target.engine import Engine
from lorac.target.kv_cache import DecodeStep, KeyValueCache

DecodeTokens = Callable[[KeyValueCache, DecodeStep], Tensor]
"""``BoundProgram.decode`` of one graph."""
_INITIAL_ROOM = 1024
"""The most new tokens for which a cache is allocated at first; it grows where a row gets more."""


class DecodingState:
    """A cache as transformers sees it; ``feed`` takes whole rows or their last tokens, and computes the new ones.

    Args:
        cache: the keys and values of the rows.

    Attributes:
        chunk_size: the most tokens of a row per call; None: all.
        max_length: the most tokens that a row may get.
        rows: the tokens of each row, set at the end of a call that returns this state.
        engine: the engine that computed the rows.
        fed: the tokens of each prompt as the program takes them, where they differ from the ids.
        blocks: (rows, count, 2): blocks of prompt tokens that attend to each other and must share a call.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: KeyValueCache) -> None:
        self.cache, self.max_length = cache, cache.capacity
        self.chunk_size: int | None = None
        self.rows: Sequence[Tensor] | None = None
        self.engine: weakref.ref[Engine] | None = None
        self.fed: Sequence[Tensor] = ()
        self.blocks: Tensor | None = None

    @staticmethod
    def initial_capacity(length: int, new: int) -> int:
        """Return the first capacity of a cache, for rows of a length that may get ``new`` tokens."""
        return length + min(new, _INITIAL_ROOM)

    def feed(self, decode: DecodeTokens, ids: Tensor, mask: Tensor | None, keep: int) -> Tensor:
        """Compute the new tokens of the rows and add them to the cache; a call that fails adds none.

        Args:
            decode: runs the program.
            ids: token ids (rows, length), padded on the left: the whole rows, or their last columns.
            mask: (rows, length of the whole rows), 1 for tokens; None where nothing is padding.
            keep: the number of tokens of each row whose logits are returned.

        Returns:
            Logits of each row's last ``keep`` tokens (rows, keep, vocabulary).
        """
        new, lengths = self._new_tokens(ids, mask), self.cache.lengths
        for place, (row, length) in enumerate(zip(self.fed, lengths, strict=False)):
            new[place] = torch.cat([row[length:], new[place][max(len(row) - length, 0) :]])
        self.fed = ()
        counts = [row.shape[0] for row in new]
        tokens = torch.nn.utils.rnn.pad_sequence(new, batch_first=True)
        try:
            self._grow(counts)
            size = self.chunk_size or 1
            last, before = max(self.chunk_size or max(counts), keep), self.cache.lengths
            early = self._leave_blocks(before, [max(count - last, 0) for count in counts], ahead=False)
            done = [0] * len(counts)
            while done != early:
                ends = [min(begin + size, end) for begin, end in zip(done, early, strict=True)]
                upto = self._leave_blocks(before, ends, ahead=True)
                ids = _join_parts(tokens, done, upto)
                chunk = [end - begin for begin, end in zip(done, upto, strict=True)]
                decode(self.cache, DecodeStep(ids=ids, counts=chunk, wanted=torch.zeros_like(ids[:, :1])))
                done = upto
            rest = [count - done for count, done in zip(counts, early, strict=True)]
            ids = _join_parts(tokens, early, counts)
            wanted = torch.tensor(rest)[:, None] - keep + torch.arange(keep)
            return decode(self.cache, DecodeStep(ids=ids, counts=rest, wanted=wanted.clamp(min=0)))
        except BaseException:
            self.cache.crop(lengths)
            raise
        finally:
            self.blocks = None

    def step(self, decode: DecodeTokens, tokens: Tensor, unfinished: Sequence[int]) -> Tensor:
        """Add one token to each unfinished row; return logits (rows, vocabulary), zeros for the finished rows.

        Args:
            decode: runs the program.
            tokens: (rows,).
            unfinished: 1 for a row that gets its token, 0 for a finished row.
        """
        self._grow(unfinished)
        last = torch.zeros_like(tokens[:, None])
        logits = decode(self.cache, DecodeStep(ids=tokens[:, None], counts=unfinished, wanted=last))[:, 0]
        if all(unfinished):
            return logits
        return torch.where(torch.tensor(unfinished, dtype=torch.bool)[:, None], logits, logits.new_zeros(()))

    def get_seq_length(self) -> int:
        """Return the number of tokens of the first row."""
        return self.cache.lengths[0]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens of every row; transformers gives their number as a negative one."""
        if tokens_to_remove:
            self.cache.crop([length - abs(tokens_to_remove) for length in self.cache.lengths])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows by index, as transformers' beam search calls it."""
        self.select(beam_idx.tolist())

    def activate_past_recording(self) -> None:
        """Do nothing: tokens that were removed can always be fed again."""

    def select(self, rows: Sequence[int]) -> None:
        """Select rows by index, with repetition; do nothing where the selection is all rows in order."""
        if list(rows) != list(range(len(self.cache.lengths))):
            self.cache.select(rows)

    def _new_tokens(self, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
        """Return the tokens of each row that are not in the cache."""
        lengths, width = self.cache.lengths, ids.shape[1]
        if mask is None:
            return [row[length:] for row, length in zip(ids, lengths, strict=True)]
        is_token = mask.bool()
        before = [int(row.sum()) for row in is_token[:, : is_token.shape[1] - width]]
        given = [row[own] for row, own in zip(ids, is_token[:, -width:], strict=True)]
        return [row[length - early :] for row, length, early in zip(given, lengths, before, strict=True)]

    def _leave_blocks(self, before: Sequence[int], places: list[int], *, ahead: bool) -> list[int]:
        """Move each row's place, counted in its new tokens, to the nearest that divides no block."""
        if self.blocks is None:
            return places
        rows = zip(self.blocks, before, places, strict=True)
        moved = [leave_block(row, past + place, ahead=ahead) - past for row, past, place in rows]
        return [max(place, 0) for place in moved]

    def _grow(self, counts: Sequence[int]) -> None:
        """Grow the cache where the new tokens of a row do not fit."""
        needed = max(length + count for length, count in zip(self.cache.lengths, counts, strict=True))
        if needed > self.cache.capacity:
            self.cache.grow(max(needed, min(2 * self.cache.capacity, self.max_length)))


def _join_parts(tokens: Tensor, begins: Sequence[int], ends: Sequence[int]) -> Tensor:
    parts = [row[begin:end] for row, begin, end in zip(tokens, begins, ends, strict=True)]
    return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
