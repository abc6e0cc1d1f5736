"""The computation of a site of each kind in traceable torch ops: its base, and the two halves of a low-rank pair.

Layouts of the tensors a site takes at run time ("slot layouts"), K inputs, N outputs, R rank:

    =========  ==============  ==============  =====================
    kind       A               B               W (bound)
    =========  ==============  ==============  =====================
    linear     [K, R]          [R, N]          [K, N]
    embedding  [V, R]          [R, d]          [V, d]
    conv       [R, in, *k]     [N, R, 1, …]    [N, in/groups, *k]
    matrix     –               –               as it is stored
    =========  ==============  ==============  =====================

Where rows of a batch have different slots, A, B and vectors have a first axis of places (``lorac.ir.slots.places``),
and the input is cut into segments (places, rows, …).

A site whose weight is read ``within`` its module's forward has a slot for W only, and its module does the computation.

Elsewhere (``lorac.ir.algebra.changes``) tensors are matrices A (K, R), B (R, N), W (N, K); ``slot_*`` converts them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorac.ir.algebra.changes import multiply_blocks
from lorac.ir.sites.site import CONVOLUTION_KINDS, Site, SiteKind
from lorac.ir.slots.places import CONVOLUTIONS, convolve_segments

_MATRIX = 2


class SiteLayout(ABC):
    """The computation of one kind of site, and the layout of its slots; defaults are for matrices and vectors."""

    keeps_bias_inside: bool = False
    """Whether the base's op adds the bias (a convolution's does); otherwise the bias is added last."""
    has_input_axis: bool = True
    """Whether the input has an axis of features that can be scaled and transformed."""
    input_axes: int = 1
    """The number of trailing axes of the input that are features, not rows or tokens."""
    output_axes: int = 1
    """The number of trailing axes of the output that are features."""

    def __init__(self, site: Site) -> None:
        self.site = site

    @abstractmethod
    def base(self, x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        """Return the site's output without adapters, from the weight as the module stores it."""

    @abstractmethod
    def bound(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the site's output with another weight, given in slot layout."""

    @abstractmethod
    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """Return x·A, the first half of the low-rank pair."""

    def up(self, u: Tensor, b: Tensor) -> Tensor:
        """Return u·B, the second half of the pair."""
        return _multiply(u, b)

    def per_output(self, vector: Tensor) -> Tensor:
        """Shape a vector (out,) to broadcast over the site's output."""
        return vector

    def per_rank(self, vector: Tensor) -> Tensor:
        """Shape a vector (R,) to broadcast over x·A."""
        return vector

    def per_input(self, vector: Tensor) -> Tensor:
        """Shape a vector (in,) to broadcast over the site's input, if it ``has_input_axis``."""
        return vector

    def through(self, x: Tensor, blocks: Tensor) -> Tensor:
        """Multiply the input (…, in) by a block-diagonal matrix of blocks (n, k, k), if it ``has_input_axis``."""
        return multiply_blocks(x, blocks)

    def shape_a(self, rank: int | torch.SymInt) -> tuple[int | torch.SymInt, ...]:
        """Return the shape of A in slot layout."""
        return (self.site.in_features, rank)

    def shape_b(self, rank: int | torch.SymInt) -> tuple[int | torch.SymInt, ...]:
        """Return the shape of B in slot layout."""
        return (rank, self.site.out_features)

    def slot_a(self, a: Tensor) -> Tensor:
        """Convert a matrix A (K, R) to slot layout."""
        return a

    def slot_b(self, b: Tensor) -> Tensor:
        """Convert a matrix B (R, N) to slot layout."""
        return b

    def slot_weight(self, matrix: Tensor) -> Tensor:
        """Convert a matrix (N, K) to slot layout."""
        return matrix.t()

    def stored(self, slot: Tensor) -> Tensor:
        """Convert a weight in slot layout to the module's layout, for sites read ``within`` a module's forward."""
        return self.site.store(slot.t())


class LinearLayout(SiteLayout):
    """``y = x·Wᵀ + b`` over the last axis."""

    def base(self, x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.site.present(stored), bias)

    def bound(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = _multiply(x, weight)
        return y if bias is None else y + bias.to(y.dtype)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return _multiply(x, a)


def _multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply by a matrix, or by one matrix per segment; torch traces ``bmm`` faster than ``matmul``."""
    return torch.matmul(x, matrix) if matrix.dim() == _MATRIX else torch.bmm(x, matrix)


class EmbeddingLayout(SiteLayout):
    """``y = Wᵀ[ids]``: a linear site over one-hot rows."""

    has_input_axis = False
    input_axes = 0

    def base(self, x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        return F.embedding(x, stored, padding_idx=self.site.padding_idx if self.site.padding_idx >= 0 else None)

    def bound(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.embedding(x, weight)
        return y if bias is None else y + bias.to(y.dtype)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        if a.dim() > _MATRIX:  # one table per segment
            return a[torch.arange(a.shape[0], device=x.device)[:, None], x]
        return F.embedding(x, a)


class ConvLayout(SiteLayout):
    """A convolution: A has the base's kernel and geometry, B is 1x1 (PEFT's form)."""

    keeps_bias_inside = True
    has_input_axis = False

    def __init__(self, site: Site) -> None:
        super().__init__(site)
        assert site.conv is not None
        self.conv = site.conv
        self.rank = len(site.conv.kernel)
        self.ones = (1,) * self.rank
        self.input_axes = self.output_axes = 1 + self.rank

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        leading, conv = x.shape[: -self.input_axes], self.conv
        segmented = len(leading) > 1
        batch = x.flatten(0, len(leading) - 1) if segmented else x
        y = CONVOLUTIONS[self.rank](batch, weight, bias, conv.stride, conv.padding, conv.dilation, groups)
        return y.unflatten(0, leading) if segmented else y

    def base(self, x: Tensor, stored: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(x, stored, bias, self.conv.groups)

    def bound(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._convolve(x, weight, bias, self.conv.groups)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        if a.dim() > self.rank + _MATRIX:  # one kernel per segment
            return convolve_segments(x, a, self.conv.stride, self.conv.padding, self.conv.dilation)
        return self._convolve(x, a, None, 1)

    def up(self, u: Tensor, b: Tensor) -> Tensor:
        if b.dim() > self.rank + _MATRIX:
            return convolve_segments(u, b, self.ones, (0,) * self.rank, self.ones)
        return CONVOLUTIONS[self.rank](u, b)

    def per_output(self, vector: Tensor) -> Tensor:
        return vector[(..., *(None,) * self.rank)]

    def per_rank(self, vector: Tensor) -> Tensor:
        return self.per_output(vector)

    def shape_a(self, rank: int | torch.SymInt) -> tuple[int | torch.SymInt, ...]:
        return (rank, self.conv.channels, *self.conv.kernel)

    def shape_b(self, rank: int | torch.SymInt) -> tuple[int | torch.SymInt, ...]:
        return (self.site.out_features, rank, *self.ones)

    def slot_a(self, a: Tensor) -> Tensor:
        return a.t().reshape(self.shape_a(a.shape[1]))

    def slot_b(self, b: Tensor) -> Tensor:
        return b.t().reshape(self.shape_b(b.shape[0]))

    def slot_weight(self, matrix: Tensor) -> Tensor:
        return self.site.store(matrix)


class ParameterLayout(SiteLayout):
    """A parameter that its module uses in its own forward, or a block: no product; a slot is the stored parameter."""

    def base(self, *_: Tensor | None) -> Tensor:
        raise AssertionError(f"'{self.site.path}' is a {self.site.kind}: its layout has no product with an input")

    bound = down = base  # type: ignore[assignment]  # each raises, whatever it is given

    def slot_weight(self, matrix: Tensor) -> Tensor:
        return self.site.store(matrix)

    def stored(self, slot: Tensor) -> Tensor:
        return slot


_LAYOUTS: dict[SiteKind, type[SiteLayout]] = {
    **dict.fromkeys(SiteKind, ParameterLayout),
    **dict.fromkeys(CONVOLUTION_KINDS.values(), ConvLayout),
    SiteKind.LINEAR: LinearLayout,
    SiteKind.EMBEDDING: EmbeddingLayout,
}


def layout_of(site: Site) -> SiteLayout:
    """Return the layout of a site."""
    return _LAYOUTS[site.kind](site)


T = TypeVar("T")


def pad_rows(tensor: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Pad a tensor with rows of one value to ``size`` rows."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, size - len(tensor)), value=value)


def mark_beyond(tensor: Tensor | None, site: Site, size: int = 0) -> None:
    """Mark padding beyond a layer's size, in its bias or in an embedding's weight; size 0 is the model's own."""
    if site.own_size and tensor is not None:
        tensor[size or site.own_size :] = math.nan if site.kind is SiteKind.EMBEDDING else -math.inf


def hide_beyond(y: Tensor, x: Tensor, site: Site, sizes: Sequence[int]) -> Tensor:
    """Return a layer's output with −inf, or NaN for embeddings, where a row's layer is narrower than the output.

    Args:
        y, x: output and input of the site; the first axis is the rows.
        sizes: the layer's size for each equal part of the rows.
    """
    if min(sizes) == site.size:
        return y
    limits = torch.tensor(sizes, device=y.device).repeat_interleave(len(y) // len(sizes) if len(sizes) > 1 else 1)
    embeds = site.kind is SiteKind.EMBEDDING
    places = x[..., None] if embeds else layout_of(site).per_output(torch.arange(site.size, device=y.device))
    return y.masked_fill(places >= limits.view(-1, *(1,) * (y.dim() - 1)), math.nan if embeds else -math.inf)


def drop_marked(output: T) -> T:
    """Return an output (rows, …) without trailing entries of axes that are −inf in every row."""
    if not isinstance(output, Tensor | np.ndarray) or output.ndim < 2:
        return output
    values, kept = torch.as_tensor(output), [slice(None)] * output.ndim
    for axis in (1, output.ndim - 1):
        if (values.select(axis, -1) == -math.inf).all():
            own = (values != -math.inf).movedim(axis, 0).flatten(1).any(1).nonzero()
            kept[axis] = slice(int(own.max()) + 1 if len(own) else None)
    return output[tuple(kept)]  # type: ignore[return-value]  # the slice has the same type
