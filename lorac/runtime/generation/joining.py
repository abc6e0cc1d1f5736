"""Rows that go different ways: those of one kind run together, and what they give is put together again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorac.errors import Unavailable


def group_rows(kinds: Sequence[Hashable]) -> list[list[int]]:
    """Rows by their kinds, as these come first."""
    groups: dict[Hashable, list[int]] = {}
    for row, kind in enumerate(kinds):
        groups.setdefault(kind, []).append(row)
    return list(groups.values())


def select_rows(told: Mapping[str, Any], rows: Sequence[int], total: int) -> dict[str, Any]:
    """What some rows get of a call's inputs and options.

    Args:
        told: of all rows.
        rows: which.
        total: how many there are.
    """
    part = {name: _select_value(value, rows, total) for name, value in told.items()}
    allowed = part.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        part["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(rows[row], ids)
    return part


def _select_value(value: Any, rows: Sequence[int], total: int) -> Any:
    has_rows = isinstance(value, Tensor | np.ndarray) and value.ndim > 1 and value.shape[0] == total
    return value[list(rows)] if has_rows else value


@dataclass(frozen=True)
class RowJoiner:
    """The answers of several runs as one.

    Attributes:
        groups: the rows of each.
        pad: fills up sequences that are shorter than others.
        beams: beams of each row.
    """

    groups: Sequence[Sequence[int]]
    pad: int
    beams: int

    def whole(self, parts: Sequence[Any]) -> Any:
        """One answer: sequences, or transformers' output of the kind that the runs gave; a cache is not among it.

        Raises:
            Unavailable: it holds what belongs to one run alone.
        """
        if isinstance(parts[0], Tensor):
            return self._rows(parts, self.pad)
        fields = {name: [part.get(name) for part in parts] for name in list(parts[0]) if name != "cache"}
        return type(parts[0])(**{name: self._field(name, values) for name, values in fields.items()})

    def _field(self, name: str, values: Sequence[Any]) -> Any:
        if name == "sequences":
            return self._rows(values, self.pad)
        if name == "sequences_scores":
            return self._rows([value[:, None] for value in values], 0)[:, 0]
        if name == "beam_indices":
            return self._rows([self._beams(value, rows) for value, rows in zip(values, self.groups, strict=True)], -1)
        if name in ("scores", "logits"):
            return self._steps(values)
        raise Unavailable(
            f"the {name} of rows that choose their own adapters, seeds or drafts cannot be put together",
            next_step="call once per choice, or leave out what asks for them",
        )

    def _beams(self, indices: Tensor, rows: Sequence[int]) -> Tensor:
        """Indices into a run's own beams, as indices into those of all rows."""
        first = torch.tensor(rows)[indices.clamp(min=0) // self.beams] * self.beams
        return torch.where(indices < 0, indices, first + indices % self.beams)

    def _steps(self, values: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """What each step told of each row; zeros where its run was done."""
        longest = max(map(len, values))
        full = [[*steps, *[torch.zeros_like(steps[0])] * (longest - len(steps))] for steps in values]
        return tuple(self._rows(step, 0) for step in zip(*full, strict=True))

    def _rows(self, parts: Sequence[Tensor], fill: int) -> Tensor:
        """Rows of several runs, in the order of the batch, filled up on the right."""
        longest = max(part.shape[1] for part in parts)
        padded = [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
        each = padded[0].shape[0] // len(self.groups[0])
        order = torch.argsort(torch.tensor([row for rows in self.groups for row in rows]), stable=True)
        places = (order[:, None] * each + torch.arange(each)).flatten()
        return torch.cat(padded)[places]
