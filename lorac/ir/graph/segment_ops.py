"""The ops that cut a batch into segments of rows with different adapters, and join them (``lorac.ir.slots.places``).

They are custom ops because torch would check for a reshape that the number of places divides the number of rows, and
would specialise to the sizes of the example.
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
    """Cut a batch into one segment per place of a slot (``lorac.ir.slots.places.cut_segments``)."""
    return cut_segments(x, slot.shape[0], features).clone()


@cut.register_fake
def _(x: Tensor, slot: Tensor, features: int) -> Tensor:
    leading, places = x.dim() - features, slot.shape[0]
    rows, mode = x.shape[:leading], detect_fake_mode([x])
    if mode is None or mode.shape_env is None or isinstance(places, int):
        tokens: int | torch.SymInt = math.prod(rows) // places
    else:
        # A new symbolic size: torch knows a quotient only by its value in the example, and takes 0 or 1 for a constant.
        source = f"segment of {' x '.join(map(str, rows))} in {places}"
        tokens = make_size(mode.shape_env, source, _TOKENS)
    return x.new_empty((places, tokens, *x.shape[leading:]))


@torch.library.custom_op("lorac::join_segments", mutates_args=())
def join(y: Tensor, like: Tensor, features: int) -> Tensor:
    """Join segments into a batch (``lorac.ir.slots.places.join_segments``)."""
    return join_segments(y, like, features).clone()


@join.register_fake
def _(y: Tensor, like: Tensor, features: int) -> Tensor:
    return y.new_empty((*like.shape[: like.dim() - features], *y.shape[2:]))


_TOKENS = 13
"""The tokens of a segment in an example: a number that models rarely have as a size."""
SEGMENTS = SegmentOps(cut, join)
CUT, JOIN = cut._opoverload, join._opoverload
