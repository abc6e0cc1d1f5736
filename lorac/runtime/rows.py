"""One choice of adapters per row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from lorac.errors import ChoiceError, Unavailable
from lorac.ir.slots.choice import Spec


def batch_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """Rows of the first input that has any."""
    for value in (*args, *kwargs.values()):
        if hasattr(value, "shape") and len(value.shape):
            return int(value.shape[0])
    raise ChoiceError(
        "no input has rows, so adapters= cannot be a list", next_step="give one choice for the whole call"
    )


def check_rows(args: tuple[Any, ...], kwargs: Mapping[str, Any], choices: Sequence[Spec]) -> None:
    """Raise ``ChoiceError`` unless there is one choice per row."""
    rows = batch_size(args, kwargs)
    if rows != len(choices):
        raise ChoiceError(
            f"{len(choices)} choices of adapters for {rows} rows",
            next_step="give one choice per row, or a single choice for all",
        )


def run_rows(
    run: Callable[[tuple[Any, ...], dict[str, Any], Spec], Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    choices: Sequence[Spec],
) -> Any:
    """Run a batch whose rows choose differently, one call per distinct choice, rows put back in order.

    Raises:
        ChoiceError: rows and choices differ in number.
        Unavailable: an output is not a tensor with one row per input row.
    """
    check_rows(args, kwargs, choices)
    groups: dict[str, list[int]] = {}
    for row, choice in enumerate(choices):
        groups.setdefault(repr(choice), []).append(row)
    outputs = [
        (rows, run(_rows_of(args, rows, len(choices)), _rows_of(kwargs, rows, len(choices)), choices[rows[0]]))
        for rows in groups.values()
    ]
    return _gather(outputs, len(choices))


def _rows_of(value: Any, rows: list[int], total: int) -> Any:
    if isinstance(value, Mapping):
        return {key: _rows_of(item, rows, total) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_rows_of(item, rows, total) for item in value)
    if hasattr(value, "shape") and len(value.shape) and value.shape[0] == total:
        return value[rows]
    return value


def _gather(outputs: list[tuple[list[int], Any]], total: int) -> Any:
    first = outputs[0][1]
    if isinstance(first, Mapping):
        merged = {key: _gather([(rows, out[key]) for rows, out in outputs], total) for key in first}
        return type(first)(**merged)
    if isinstance(first, tuple | list):
        return type(first)(_gather([(rows, out[i]) for rows, out in outputs], total) for i in range(len(first)))
    if first is None:
        return None
    if not hasattr(first, "shape") or not len(first.shape) or first.shape[0] != len(outputs[0][0]):
        raise Unavailable(
            "an output has no row per input row, so rows cannot choose their own adapters",
            next_step="call once per choice, or have the model leave that output out",
        )
    as_torch = isinstance(first, torch.Tensor)
    stacked = torch.cat([out if as_torch else torch.from_numpy(out) for _, out in outputs])
    order = torch.argsort(torch.tensor([row for rows, _ in outputs for row in rows]))
    return stacked[order] if as_torch else stacked[order].numpy()
