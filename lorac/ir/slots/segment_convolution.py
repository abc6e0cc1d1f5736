"""Convolutions of rows that have kernels of their own (``lorac.ir.slots.rows``)."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
"""Number of spatial axes -> the convolution."""


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
