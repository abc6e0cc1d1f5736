"""The ops between a batch and its segments, in which rows have adapters of their own (``lorac.ir.slots.places``).

They are ops of their own because torch would ask of a reshape whether the number of places divides that of the rows,
and fix the sizes of the example by its answer.
"""

import math

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

from lorac.ir.graph.symbolic_shapes import make_size
from lorac.ir.slots.placed_execution import SegmentOps
from lorac.ir.slots.places import cut_segments, join_segments


@torch.library.custom_op("lorac::cut_segments", mutates_args=())
def cut(x: Tensor, slot: Tensor, features: int) -> Tensor:
    """Cut a batch into as many segments as a slot has places (``lorac.ir.slots.places.cut_segments``)."""
    return cut_segments(x, slot.shape[0], features).clone()


@cut.register_fake
def _(x: Tensor, slot: Tensor, features: int) -> Tensor:
    leading, places = x.dim() - features, slot.shape[0]
    rows, mode = x.shape[:leading], detect_fake_mode([x])
    if mode is None or mode.shape_env is None or isinstance(places, int):
        tokens: int | torch.SymInt = math.prod(rows) // places
    else:
        # A size of its own: torch knows only the example's value of a quotient, and takes a value of 0 or 1 for a
        # constant.
        source = f"segment of {' x '.join(map(str, rows))} in {places}"
        tokens = make_size(mode.shape_env, source, _TOKENS)
    return x.new_empty((places, tokens, *x.shape[leading:]))


@torch.library.custom_op("lorac::join_segments", mutates_args=())
def join(y: Tensor, like: Tensor, features: int) -> Tensor:
    """Join segments to a batch (``lorac.ir.slots.places.join_segments``)."""
    return join_segments(y, like, features).clone()


@join.register_fake
def _(y: Tensor, like: Tensor, features: int) -> Tensor:
    return y.new_empty((*like.shape[: like.dim() - features], *y.shape[2:]))


_TOKENS = 13
"""The tokens of a segment in an example: a number that sizes of models rarely are."""
SEGMENTS = SegmentOps(cut, join)
CUT, JOIN = cut._opoverload, join._opoverload
