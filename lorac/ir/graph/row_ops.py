"""The ops between a batch and its segments, in which rows have adapters of their own (``lorac.ir.slots.rows``).

They are ops of their own because torch would ask of a reshape whether the number of places divides that of the rows,
and fix the sizes of the example by its answer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lorac.ir.slots.rows import cut_segments, join_segments


@torch.library.custom_op("lorac::cut_segments", mutates_args=())
def cut(x: Tensor, slot: Tensor, features: int) -> Tensor:
    """Cut a batch into as many segments as a slot has places (``lorac.ir.slots.rows.cut_segments``)."""
    return cut_segments(x, slot.shape[0], features).clone()


@cut.register_fake
def _(x: Tensor, slot: Tensor, features: int) -> Tensor:
    leading = x.dim() - features
    tokens = math.prod(x.shape[:leading]) // slot.shape[0]
    return x.new_empty((slot.shape[0], tokens, *x.shape[leading:]))


@torch.library.custom_op("lorac::join_segments", mutates_args=())
def join(y: Tensor, like: Tensor, features: int) -> Tensor:
    """Join segments to a batch (``lorac.ir.slots.rows.join_segments``)."""
    return join_segments(y, like, features).clone()


@join.register_fake
def _(y: Tensor, like: Tensor, features: int) -> Tensor:
    return y.new_empty((*like.shape[: like.dim() - features], y.shape[-1]))


CUT, JOIN = cut._opoverload, join._opoverload
