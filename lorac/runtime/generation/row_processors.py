"""Logits processors of many rows, each with options of its own, run as few times as possible.

transformers' processors take one value for a whole batch. Of several processors of one class whose only difference is
a number, one is run on all their rows with a column of those numbers in the number's place. Others that look at the
scores alone run once for all rows with equal settings, and those that look at a row's text run row by row.
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Processor = Callable[[Tensor, Tensor], Tensor]
"""(texts (rows, length), scores (rows, vocabulary)) -> scores."""
_NUMBERS = {
    "TemperatureLogitsWarper": "temperature",
    "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p",
    "RepetitionPenaltyLogitsProcessor": "penalty",
}
"""Class of transformers' -> the attribute that may be a column, with a number for each row."""
_COUNT = {"TopKLogitsWarper": "top_k"}
"""Class of transformers' -> the attribute that is a number of tokens for each row."""
_OF_SCORES = ("EpsilonLogitsWarper", "EtaLogitsWarper", "TopKLogitsWarper", "TypicalLogitsWarper")
"""Classes of transformers' that look at the scores alone."""


class RowProcessors:
    """The processors of several rows.

    Args:
        rows: the processors of each row, in the order in which they run.

    Attributes:
        failed: row -> the error of a processor of that row alone in the last call; its scores mean nothing.
    """

    def __init__(self, rows: Sequence[Iterable[Processor]]) -> None:
        left = [list(row) for row in rows]
        stages: list[_Stage] = []
        while any(left):
            kinds = {_class_name(row[0]): None for row in left if row}
            # A class that comes later in some row waits for that row, so that all rows which have it run together.
            ready = (name for name in kinds if not any(name in map(_class_name, row[1:]) for row in left))
            name = next(ready, next(iter(kinds)))
            heads = {index: row.pop(0) for index, row in enumerate(left) if row and _class_name(row[0]) == name}
            stages += _join(name, heads)
        self._stages = stages
        self._count = len(rows)
        self.failed: dict[int, Exception] = {}

    def __call__(self, texts: Sequence[Tensor], scores: Tensor) -> Tensor:
        """Return the scores as each row's processors leave them.

        Args:
            texts: the tokens of each row, of any lengths.
            scores: (rows, vocabulary).
        """
        self.failed = {}
        for stage in self._stages:
            run = self._run_alone if len(stage.rows) == 1 else self._run
            scores = run(stage, texts, scores)
        return scores

    def _run_alone(self, stage: "_Stage", texts: Sequence[Tensor], scores: Tensor) -> Tensor:
        """Run a processor of one row; if it fails, no other row suffers."""
        try:
            return scores if stage.rows[0] in self.failed else self._run(stage, texts, scores)
        except Exception as error:
            self.failed[stage.rows[0]] = error
            return scores

    def _run(self, stage: "_Stage", texts: Sequence[Tensor], scores: Tensor) -> Tensor:
        if len(stage.rows) == self._count:
            return stage(texts, scores)
        own = stage([texts[row] for row in stage.rows], scores[stage.rows])
        return scores.index_copy(0, torch.tensor(stage.rows), own)


@dataclass(frozen=True)
class _Stage:
    """One call of a processor.

    Attributes:
        rows: the rows that it processes.
        process: the processor.
    """

    rows: list[int]
    process: Processor

    def __call__(self, texts: Sequence[Tensor], scores: Tensor) -> Tensor:
        longest = max(len(text) for text in texts)
        # A row is filled up with its first token, which changes nothing for what asks whether a token occurs.
        filled = [torch.cat([text[:1].expand(longest - len(text)), text]) for text in texts]
        return self.process(torch.stack(filled), scores)


def _join(name: str, heads: dict[int, Any]) -> list[_Stage]:
    """Return the calls for processors of one class, by row."""
    number = _NUMBERS.get(name) or _COUNT.get(name)
    groups: dict[Hashable, list[int]] = {}
    for row, processor in heads.items():
        together = number is not None or name in _OF_SCORES
        settings = {key: value for key, value in vars(processor).items() if key != number} if together else {"row": row}
        groups.setdefault(tuple(sorted((key, repr(value)) for key, value in settings.items())), []).append(row)
    return [_Stage(rows, _stack([heads[row] for row in rows], number, name)) for rows in groups.values()]


def _stack(processors: Sequence[Any], number: str | None, name: str) -> Processor:
    """Return one processor for the rows of several, which differ in a number alone."""
    first = processors[0]
    values = [] if number is None else [getattr(one, number) for one in processors]
    if len({*values}) < 2:
        return first
    if name in _COUNT:
        return _TopK(torch.tensor(values)[:, None], first.filter_value)
    stacked = copy.copy(first)
    setattr(stacked, str(number), torch.tensor(values, dtype=torch.float64)[:, None].float())
    return stacked


@dataclass(frozen=True, eq=False)
class _TopK:
    """transformers' ``TopKLogitsWarper`` with a number of tokens for each row.

    Attributes:
        counts: (rows, 1).
        fill: the score of all other tokens.
    """

    counts: Tensor
    fill: float

    def __call__(self, texts: Tensor, scores: Tensor) -> Tensor:
        counts = self.counts.clamp(max=scores.shape[-1])
        least = scores.topk(int(counts.max())).values.gather(1, counts - 1)
        return scores.masked_fill(scores < least, self.fill)


def _class_name(processor: object) -> str:
    """Return the class's name if it is transformers' own, else a name that no other class has."""
    cls = type(processor)
    return cls.__name__ if cls.__module__ == "transformers.generation.logits_process" else f"{cls.__module__}.{id(cls)}"
