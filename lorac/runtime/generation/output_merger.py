"""Calls of ``generate`` that take several runs: options are selected by row, and outputs are merged."""

from collections.abc import Sequence
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


def merge_outputs(outputs: Sequence[Any], groups: Sequence[Sequence[int]], fill: int, beams: int) -> Any:
    """Merge sequences, or transformers' output objects, of several runs of ``generate``; a cache is left out.

    Args:
        outputs: the output of each run.
        groups: the rows of each run.
        fill: the token id that pads shorter sequences.
        beams: the number of beams of each row.

    Raises:
        Unavailable: an output belongs to one run alone.
    """
    if isinstance(outputs[0], Tensor):
        return _stack(groups, outputs, fill)
    merged: dict[str, object] = {}
    for name in [name for name in outputs[0] if name != "cache"]:
        values = [output.get(name) for output in outputs]
        if name == "sequences":
            merged[name] = _stack(groups, values, fill)
        elif name == "sequences_scores":
            merged[name] = _stack(groups, [value[:, None] for value in values], 0)[:, 0]
        elif name == "beam_indices":
            shifted = []
            for indices, rows in zip(values, groups, strict=True):
                # A run numbers its own beams; the output numbers the beams of all rows.
                first = torch.tensor(rows)[indices.clamp(min=0) // beams] * beams
                shifted.append(torch.where(indices < 0, indices, first + indices % beams))
            merged[name] = _stack(groups, shifted, -1)
        elif name in ("scores", "logits"):
            longest = max(map(len, values))
            padded = [[*steps, *[torch.zeros_like(steps[0])] * (longest - len(steps))] for steps in values]
            merged[name] = tuple(_stack(groups, step, 0) for step in zip(*padded, strict=True))
        else:
            raise Unavailable(
                f"the {name} of rows that choose their own adapters, seeds or drafts cannot be merged",
                next_step="call once per choice, or leave out the option that asks for them",
            )
    return type(outputs[0])(**merged)


def _stack(groups: Sequence[Sequence[int]], parts: Sequence[Tensor], fill: int) -> Tensor:
    """Concatenate the rows of several runs in the batch's order, padded on the right."""
    longest = max(part.shape[1] for part in parts)
    padded = [torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts]
    copies = padded[0].shape[0] // len(groups[0])
    order = torch.argsort(torch.tensor([row for rows in groups for row in rows]))[:, None] * copies
    return torch.cat(padded)[(order + torch.arange(copies)).flatten()]
