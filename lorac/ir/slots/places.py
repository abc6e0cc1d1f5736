"""Rows of a batch that choose their own adapters: the places of slots, and the segments of rows that take them.

A slot may hold several places, one behind the other along a new first axis. A batch is then cut into as many segments
of neighbouring rows, all of one size, and each takes its own place: one place serves all rows, as many places as rows
serve each row by itself, and rows that are sorted by their choice share the places between. Since a segment is a part
of the batch as it lies in memory, cutting copies nothing, and a row count needs no divisor: there is always one place
per row. So groups of several sizes cost as much as rows that are all different. Gathering their rows into segments of
one size would cost less (measured at 32 rows of a token over 8 adapters: 1.14 of the base instead of 1.25 next to int4
weights, 1.12 instead of 1.22 next to float), and up to 3 % more of every other call; and a program would take the order
of its rows as one more input, for which a saved program that runs alone has no default.

Within a segment, tokens lie along one axis, so that vectors broadcast and matrices are multiplied in one batch; the
images of a convolution keep their shape, and each segment is convolved by itself. The computation of a site
(``lorac.ir.slots.execution.run_site``) is the same with places and without.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Size = int | torch.SymInt
KeyT = TypeVar("KeyT")
ADAPTERS_AXIS = "adapters"
"""The name of the axis of places."""
CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""Number of spatial axes -> the convolution."""


def placed_shape(shape: Sequence[Size], places: Size, *, by_token: bool = True) -> tuple[Size, ...]:
    """Return the shape of a slot with places.

    Args:
        shape: that of the slot without places.
        by_token: whether it meets the tokens of a segment, so that a vector gets an axis along which they lie. A
            formula sees its parameters as they are.
    """
    return (places, 1, *shape) if by_token and len(shape) == 1 else (places, *shape)


def as_place(tensor: Tensor, *, by_token: bool = True) -> Tensor:
    """Return a slot's tensor as the only place of a slot with places; nothing is copied."""
    return tensor.view(placed_shape(tensor.shape, 1, by_token=by_token))


def stack_places(tensors: Sequence[Tensor]) -> Tensor:
    """Return places one behind the other; smaller ranks are padded with zeros."""
    widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    stacked = tensors[0].new_zeros(len(tensors), *widest)
    for place, tensor in zip(stacked, tensors, strict=True):
        write_place(place, tensor)
    return stacked


def write_place(place: Tensor, tensor: Tensor) -> None:
    """Write a slot's tensor (1, …) into one place (…) of it, which it may fill in part; the rest becomes zero."""
    if place.shape == tensor.shape[1:]:
        place.copy_(tensor[0])
        return
    place.zero_()
    place[tuple(slice(size) for size in tensor.shape[1:])].copy_(tensor[0])


def cut_segments(x: Tensor, places: Size, features: int) -> Tensor:
    """Return the tokens of each segment: (places, tokens), and the axes of features that x (rows, …) has.

    Args:
        x: the batch.
        places: how many segments; it divides the number of rows.
        features: the number of axes of features, 0 for ids.
    """
    return x.reshape(places, -1, *x.shape[x.dim() - features :])


def join_segments(y: Tensor, like: Tensor, features: int) -> Tensor:
    """Return the items of all segments (places, items, …) as a batch, with the leading axes of ``like`` in their place.

    Args:
        y: the segments, as ``cut_segments`` returns them.
        like: a batch.
        features: the number of its axes that are not those of items.
    """
    return y.reshape(*like.shape[: like.dim() - features], *y.shape[2:])


def choose_places(keys: Sequence[KeyT]) -> tuple[KeyT, ...]:
    """Return the key of each place, for as few places as rows of these keys need in the order in which they come.

    All places serve the same number of rows: as many as divide the numbers of neighbours with equal keys.
    """
    neighbours = [len(list(same)) for _, same in itertools.groupby(keys)]
    return tuple(keys[:: math.gcd(*neighbours)])


def convolve_segments(
    x: Tensor, kernels: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Convolve each segment (places, rows, C, …) with its own kernel (places, N, C, …).

    A loop over the places costs as little as one convolution, and gives the bits of each place alone. In a traced
    program it is an op of its own: as one grouped convolution the program would be for one number of places.
    """
    if isinstance(kernels.shape[0], int):
        return _convolve(x, kernels, stride, padding, dilation)
    convolved: Tensor = _traced(x, kernels, [*stride], [*padding], [*dilation])
    return convolved


def _convolve(
    x: Tensor, kernels: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    convolve = CONVOLUTIONS[len(stride)]
    parts = zip(x.unbind(), kernels.unbind(), strict=True)
    return torch.stack([convolve(part, kernel, None, stride, padding, dilation) for part, kernel in parts])


@torch.library.custom_op("lorac::convolve_segments", mutates_args=())
def _traced(x: Tensor, kernels: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    return _convolve(x, kernels, stride, padding, dilation)


@_traced.register_fake
def _(x: Tensor, kernels: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    convolved = CONVOLUTIONS[len(stride)](x[0], kernels[0], None, stride, padding, dilation)
    return x.new_empty((kernels.shape[0], *convolved.shape))


CONVOLVE_SEGMENTS = _traced._opoverload
