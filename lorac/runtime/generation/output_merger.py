"""Calls of ``generate`` that take several runs: options are selected by row, and outputs are merged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorac.argument_types import Fields
from lorac.errors import Unavailable


def select_rows(options: Fields, rows: Sequence[int], total: int) -> Fields:
    """Return the inputs and options of ``generate`` for some of the rows.

    Args:
        options: the options of all rows.
        rows: the rows to select.
        total: the number of rows.
    """
    index = list(rows)
    selected = dict(options)
    for name, value in options.items():
        if isinstance(value, Tensor | np.ndarray) and value.ndim > 1 and value.shape[0] == total:
            selected[name] = value[index]
    allowed = selected.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        selected["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(rows[row], ids)
    return selected


@dataclass(frozen=True)
class OutputMerger:
    """A merger of the outputs of several runs of ``generate``.

    Attributes:
        groups: the rows of each run.
        fill: the token id that pads shorter sequences.
        beams: the number of beams of each row.
    """

    groups: Sequence[Sequence[int]]
    fill: int
    beams: int

    def merge(self, outputs: Sequence[Any]) -> Any:
        """Merge sequences, or transformers' output objects, of all runs; a cache is left out.

        Raises:
            Unavailable: an output belongs to one run alone.
        """
        if isinstance(outputs[0], Tensor):
            return self._stack(outputs, self.fill)
        fields = {name: [output.get(name) for output in outputs] for name in list(outputs[0]) if name != "cache"}
        return type(outputs[0])(**{name: self._merge_field(name, values) for name, values in fields.items()})

    def _merge_field(self, name: str, values: Sequence[Any]) -> object:
        if name == "sequences":
            return self._stack(values, self.fill)
        if name == "sequences_scores":
            return self._stack([value[:, None] for value in values], 0)[:, 0]
        if name == "beam_indices":
            shifted = []
            for indices, rows in zip(values, self.groups, strict=True):
                # A run numbers its own beams; the output numbers the beams of all rows.
                first = torch.tensor(rows)[indices.clamp(min=0) // self.beams] * self.beams
                shifted.append(torch.where(indices < 0, indices, first + indices % self.beams))
            return self._stack(shifted, -1)
        if name in ("scores", "logits"):
            longest = max(map(len, values))
            padded = [[*steps, *[torch.zeros_like(steps[0])] * (longest - len(steps))] for steps in values]
            return tuple(self._stack(step, 0) for step in zip(*padded, strict=True))
        raise Unavailable(
            f"the {name} of rows that choose their own adapters, seeds or drafts cannot be merged",
            next_step="call once per choice, or leave out the option that asks for them",
        )

    def _stack(self, parts: Sequence[Tensor], fill: int) -> Tensor:
        """Concatenate the rows of several runs in the batch's order, padded on the right."""
        longest = max(part.shape[1] for part in parts)
        padded = [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
        copies = padded[0].shape[0] // len(self.groups[0])
        order = (
            torch.argsort(torch.tensor([row for rows in self.groups for row in rows]))[:, None] * copies
            + torch.arange(copies)
        ).flatten()
        return torch.cat(padded)[order]
