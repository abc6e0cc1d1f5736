"""Logits processors of many rows, each row with its own options, in as few calls as possible.

transformers' processors take one value for a whole batch. Where processors of one class differ in a number alone, one
runs on all their rows, with a column of the rows' numbers as its attribute. Other processors that read only the scores
run once for all rows with equal settings; processors that read a row's text run row by row.
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Sequence
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
"""transformers' class -> its attribute that may be a column (rows, 1), with a number for each row."""
_COUNT = {"TopKLogitsWarper": "top_k"}
"""transformers' class -> its attribute that is a number of tokens, which lorac's own code keeps."""
_OF_SCORES = ("EpsilonLogitsWarper", "EtaLogitsWarper", "TopKLogitsWarper", "TypicalLogitsWarper")
"""transformers' classes that read only the scores, not the text."""


class RowProcessors:
    """The processors of several rows.

    Args:
        rows: the processors of each row, in the order in which they run.

    Attributes:
        failed: row -> the error that a processor of this row alone raised in the last call; its scores are invalid.
    """

    def __init__(self, rows: Sequence[Iterable[Processor]]) -> None:
        left = [list(row) for row in rows]
        stages: list[tuple[list[int], Processor]] = []
        while any(left):
            kinds = {_class_name(row[0]): None for row in left if row}
            # A class that another row reaches later waits for that row, so that its rows run in one call.
            ready = (name for name in kinds if not any(name in map(_class_name, row[1:]) for row in left))
            name = next(ready, next(iter(kinds)))
            heads = {index: row.pop(0) for index, row in enumerate(left) if row and _class_name(row[0]) == name}
            stages += _join(name, heads)
        self._stages = stages
        self._count = len(rows)
        self.failed: dict[int, Exception] = {}

    def __call__(self, texts: Sequence[Tensor], scores: Tensor) -> Tensor:
        """Run each row's processors on its scores; return the processed scores.

        Args:
            texts: the tokens of each row, of any lengths.
            scores: (rows, vocabulary).
        """
        self.failed = {}
        for rows, process in self._stages:
            if len(rows) == 1 and rows[0] in self.failed:
                continue
            try:
                scores = self._run(rows, process, texts, scores)
            except Exception as error:
                if len(rows) > 1:
                    raise
                self.failed[rows[0]] = error  # the other rows go on
        return scores

    def _run(self, rows: list[int], process: Processor, texts: Sequence[Tensor], scores: Tensor) -> Tensor:
        """Run a processor on some rows."""
        longest = max(len(texts[row]) for row in rows)
        # A row is padded with its first token: processors ask only whether a token occurs.
        filled = [torch.cat([texts[row][:1].expand(longest - len(texts[row])), texts[row]]) for row in rows]
        if len(rows) == self._count:
            return process(torch.stack(filled), scores)
        return scores.index_copy(0, torch.tensor(rows), process(torch.stack(filled), scores[rows]))


def _join(name: str, heads: dict[int, Any]) -> list[tuple[list[int], Processor]]:
    """Group the rows' processors of one class into as few calls as possible."""
    number = _NUMBERS.get(name) or _COUNT.get(name)
    groups: dict[Hashable, list[int]] = {}
    for row, processor in heads.items():
        together = number is not None or name in _OF_SCORES
        settings = {key: value for key, value in vars(processor).items() if key != number} if together else {"row": row}
        groups.setdefault(tuple(sorted((key, repr(value)) for key, value in settings.items())), []).append(row)
    return [(rows, _stack([heads[row] for row in rows], number, name)) for rows in groups.values()]


def _stack(processors: Sequence[Any], number: str | None, name: str) -> Processor:
    """Return one processor in place of several that differ in a number alone."""
    first = processors[0]
    values = [] if number is None else [getattr(one, number) for one in processors]
    if len({*values}) < 2:
        return first
    if name in _COUNT:
        every, fill = torch.tensor(values)[:, None], first.filter_value

        def keep_top(texts: Tensor, scores: Tensor) -> Tensor:  # with a k for each row
            counts = every.clamp(max=scores.shape[-1])
            least = scores.topk(int(counts.max())).values.gather(1, counts - 1)
            return scores.masked_fill(scores < least, fill)

        return keep_top
    stacked = copy.copy(first)
    setattr(stacked, str(number), torch.tensor(values, dtype=torch.float64)[:, None].float())
    return stacked


def _class_name(processor: object) -> str:
    """Return the class's name for transformers' classes, else a name unique to the class."""
    cls = type(processor)
    return cls.__name__ if cls.__module__ == "transformers.generation.logits_process" else f"{cls.__module__}.{id(cls)}"
