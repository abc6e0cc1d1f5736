"""Layers that adapters replace by layers of other sizes: heads for other labels, embeddings of other vocabularies.

The program has the largest size (``Site.own_size``), and smaller layers are padded. Padding outputs are −inf, so that
softmax, argmax and sampling over all outputs are right; ``drop_marked`` drops outputs that are padding in every row of
a call. The embedding of a token outside an adapter's vocabulary is NaN.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.layouts import layout_of

T = TypeVar("T")


def pad_rows(tensor: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Pad a tensor with rows of one value to ``size`` rows."""
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, size - len(tensor)), value=value)


def mark_beyond(tensor: Tensor | None, site: Site, size: int = 0) -> None:
    """Mark padding beyond a layer's size, in its bias or in an embedding's weight; size 0 is the model's own."""
    if site.own_size and tensor is not None:
        tensor[size or site.own_size :] = math.nan if site.kind is SiteKind.EMBEDDING else -math.inf


def hide_beyond(y: Tensor, x: Tensor, site: Site, sizes: Sequence[int]) -> Tensor:
    """Return a layer's output, with padding beyond the layer's size marked.

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
