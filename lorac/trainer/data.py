"""Training rows in their order, and evaluation rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from lorac.errors import ChoiceError
from lorac.trainer import text_rows as texts
from lorac.trainer.recipe import Recipe

Batch = dict[str, torch.Tensor]


class TrainingData:
    """The rows of a run.

    Args:
        recipe: says where they are, how many are held out, and how many a batch has.
        tokenizer: transformers'.

    Raises:
        ChoiceError: more than half of the rows are to be held out.
        OptionError, ChoiceError: as ``texts.rows``.
    """

    def __init__(self, recipe: Recipe, tokenizer: Any) -> None:
        rows = texts.tokenize_rows(recipe.data, tokenizer, recipe.max_length)
        if recipe.eval_rows * 2 > len(rows):
            raise ChoiceError(
                f"eval_rows={recipe.eval_rows} of {len(rows)} rows", next_step="hold out at most half of them"
            )
        cut = len(rows) - recipe.eval_rows
        self.recipe, self._rows, self._held_out = recipe, rows[:cut], rows[cut:]
        padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._batch = partial(texts.collate_rows, padding=int(padding or 0))

    def first(self) -> list[Batch]:
        """Return the first batches of the run, for initialisers."""
        return [self._batch(self._chosen(batch)) for batch in self._order(0, self.recipe.start_batches)]

    def loader(self, first: int, last: int) -> DataLoader[Any]:
        """Batches number ``first`` up to ``last``."""
        rows: Any = self._rows  # a list is a dataset in all but its type
        own = torch.Generator()  # a loader draws from the process's otherwise, once more in a run that is resumed
        return DataLoader(rows, batch_sampler=list(self._order(first, last)), collate_fn=self._batch, generator=own)

    def held_out(self) -> list[Batch]:
        """Return the evaluation rows in batches."""
        size = self.recipe.batch_size
        return [self._batch(self._held_out[begin : begin + size]) for begin in range(0, len(self._held_out), size)]

    def _chosen(self, batch: Sequence[int]) -> list[texts.TokenRow]:
        return [self._rows[index] for index in batch]

    def _order(self, first: int, last: int) -> Iterator[list[int]]:
        """Rows of batches, round after round over all rows; a batch depends on the seed and its number alone."""
        size, count = self.recipe.batch_size, len(self._rows)
        for number in range(first, last):
            places = (divmod(number * size + row, count) for row in range(size))
            yield [_shuffle_rows(self.recipe.seed, turn, count)[place] for turn, place in places]


@lru_cache(maxsize=4)
def _shuffle_rows(seed: int, turn: int, count: int) -> list[int]:
    """All rows once, in the order of a round."""
    generator = torch.Generator().manual_seed(seed)
    generator.manual_seed(int(torch.randint(2**62, (turn + 1,), generator=generator)[turn]))
    drawn: list[int] = torch.randperm(count, generator=generator).tolist()
    return drawn
