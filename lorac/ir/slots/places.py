"""Rows of a batch with different adapters: the places of slots, and the segments of rows that use them.

A slot may have several places along a new first axis. A batch is then cut into as many segments of neighbouring rows,
all of one size, and each segment uses one place. One place serves all rows; as many places as rows serve each row
separately; in between, rows sorted by choice share places. A segment is a contiguous part of the batch, so that cutting
copies nothing, and any number of rows works, since there can be one place per row. So groups of different sizes cost as
much as rows that are all different. Gathering rows into segments of one size would cost less (measured at 32 rows of a
token over 8 adapters: 1.14 of the base instead of 1.25 next to int4 weights, 1.12 instead of 1.22 next to float), but
up to 3 % more in every other call; and a program would take the order of its rows as another input, for which a saved
program that runs alone has no default.

In a segment, all tokens are one axis, so that vectors broadcast and one batched product multiplies matrices. The images
of a convolution keep their shape, and each segment is convolved separately. The computation of a site
(``lorac.ir.slots.execution.run_site``) is the same with and without places.
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
"""Number of spatial axes -> torch's convolution."""


def placed_shape(shape: Sequence[Size], places: Size, *, by_token: bool = True) -> tuple[Size, ...]:
    """Return the shape of a slot with places.

    Args:
        shape: the shape of the slot without places.
        by_token: whether the slot broadcasts over the tokens of a segment, so that a vector gets an axis for them. A
            formula's parameters do not.
    """
    return (places, 1, *shape) if by_token and len(shape) == 1 else (places, *shape)


def as_place(tensor: Tensor, *, by_token: bool = True) -> Tensor:
    """View a slot's tensor as a slot with one place; nothing is copied."""
    return tensor.view(placed_shape(tensor.shape, 1, by_token=by_token))


def stack_places(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors (1, …) along the axis of places; smaller ranks are padded with zeros."""
    widest = [max(sizes) for sizes in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    stacked = tensors[0].new_zeros(len(tensors), *widest)
    for place, tensor in zip(stacked, tensors, strict=True):
        write_place(place, tensor)
    return stacked


def write_place(place: Tensor, tensor: Tensor) -> None:
    """Write a slot's tensor (1, …) into one place (…), and zero the rest of the place."""
    if place.shape == tensor.shape[1:]:
        place.copy_(tensor[0])
        return
    place.zero_()
    place[tuple(slice(size) for size in tensor.shape[1:])].copy_(tensor[0])


def cut_segments(x: Tensor, places: Size, features: int) -> Tensor:
    """Cut x (rows, …) into segments: (places, tokens), then the axes of features of x.

    Args:
        x: the batch.
        places: the number of segments, a divisor of the number of rows.
        features: the number of axes of features, 0 for ids.
    """
    return x.reshape(places, -1, *x.shape[x.dim() - features :])


def join_segments(y: Tensor, like: Tensor, features: int) -> Tensor:
    """Join segments (places, items, …) into a batch with the leading axes of ``like``.

    Args:
        y: the segments, as ``cut_segments`` returns them.
        like: a batch.
        features: the number of axes of features of ``like``.
    """
    return y.reshape(*like.shape[: like.dim() - features], *y.shape[2:])


def choose_places(keys: Sequence[KeyT]) -> tuple[KeyT, ...]:
    """Return the key of each place: the fewest places that serve rows with these keys in this order.

    All places serve the same number of rows, the greatest common divisor of the lengths of runs of equal keys.
    """
    neighbours = [len(list(same)) for _, same in itertools.groupby(keys)]
    return tuple(keys[:: math.gcd(*neighbours)])


def convolve_segments(
    x: Tensor, kernels: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """Convolve each segment (places, rows, C, …) with its own kernel (places, N, C, …).

    A loop over the places costs as little as one convolution, and gives the same bits as each place alone. In a traced
    program it is a custom op: one grouped convolution would fix the number of places.
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
    count, channels = kernels.shape[1:3]
    if not count or not channels:  # idle slots have rank 0, for which torch has no convolution
        kept, more = [0, 0] * len(stride), [0, int(not channels)]
        x, kernels = F.pad(x, [*kept, *more]), F.pad(kernels, [*kept, *more, 0, int(not count)])
    return _convolve(x, kernels, stride, padding, dilation)[:, :, :count]


@_traced.register_fake
def _(x: Tensor, kernels: Tensor, stride: list[int], padding: list[int], dilation: list[int]) -> Tensor:
    convolved = CONVOLUTIONS[len(stride)](x[0], kernels[0], None, stride, padding, dilation)
    return x.new_empty((kernels.shape[0], *convolved.shape))


CONVOLVE_SEGMENTS = _traced._opoverload
