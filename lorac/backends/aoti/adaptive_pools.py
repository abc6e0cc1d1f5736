"""Adaptive pools over axes whose sizes vary, which Inductor would compute for the sizes of the example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def _average(x: Tensor, sizes: Sequence[int]) -> Any:
    if not _varies(x, sizes):
        return NotImplemented
    y = x.float() if x.dtype in {torch.float16, torch.bfloat16} else x
    for axis, count in zip(range(-len(sizes), 0), sizes, strict=True):
        windows, is_inside = _split_axis(y, axis, count, 0.0)
        y = windows.sum(axis) / is_inside.sum(axis)
    return y.to(x.dtype)


def _maximum(x: Tensor, sizes: Sequence[int]) -> Any:
    """Return the maxima and their places in the flat image; of equals the first, as in torch."""
    if not _varies(x, sizes):
        return NotImplemented
    in_rows, column = _split_axis(x, -1, sizes[1], -torch.inf)[0].max(-1)
    values, row = _split_axis(in_rows, -2, sizes[0], -torch.inf)[0].max(-2)
    return values, row * x.shape[-1] + column.gather(-2, row)


def _varies(x: Tensor, sizes: Sequence[int]) -> bool:
    return any(isinstance(size, torch.SymInt) for size in (*x.shape[-len(sizes) :], *sizes))


def _split_axis(x: Tensor, axis: int, count: int, fill: float) -> tuple[Tensor, Tensor]:
    """Repeat ``x`` for each window of an axis, with ``fill`` outside the window.

    Returns:
        The windows (…, count, size, …), where ``axis`` has the size, and which of their values are inside.
    """
    size = x.shape[axis]
    place, window = torch.arange(size, device=x.device), torch.arange(count, device=x.device)[:, None]
    is_inside = (place >= window * size // count) & (place < ((window + 1) * size + count - 1) // count)
    is_inside = is_inside.reshape(count, size, *[1] * (-1 - axis))
    return torch.where(is_inside, x.unsqueeze(axis - 1), fill), is_inside


DECOMPOSITIONS: Mapping[object, Callable[..., Any]] = {
    aten._adaptive_avg_pool2d.default: _average,
    aten.adaptive_max_pool2d.default: _maximum,
    aten.adaptive_avg_pool2d.default: aten._adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool1d.default: lambda x, sizes: aten._adaptive_avg_pool2d(x[..., None, :], (1, *sizes))[
        ..., 0, :
    ],
    aten.adaptive_max_pool1d.default: lambda x, sizes: tuple(
        y[..., 0, :] for y in aten.adaptive_max_pool2d(x[..., None, :], (1, *sizes))
    ),
}
"""Op -> function that computes it by ops that Inductor compiles for every size; fixed sizes stay as they are."""
