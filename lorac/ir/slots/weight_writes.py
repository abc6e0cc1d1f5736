"""Writes into weights, by the functions of lorac-native where it is installed."""

from __future__ import annotations

import torch
from torch import Tensor

from lorac.ir.algebra.changes import add_product
from lorac.native_library import find_native_library


def scatter(memory: Tensor, positions: Tensor, values: Tensor) -> None:
    """Write values at distinct positions (int64, ascending for speed) of a contiguous tensor of their type."""
    library = find_native_library()
    if library is None or not memory.is_cpu:
        memory.view(-1).index_put_((positions,), values)
        return
    library.scatter(memory, positions, values)
    # Autograd does not see the write, and is to refuse a backward pass over what was there.
    torch.autograd.graph.increment_version(memory)


def write_product(weight: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write W + left·right to ``out``, for matrices (n, R) and (R, m) or stacks of them."""
    library = find_native_library()
    tensors = (weight, left, right, out)
    if library is None or weight.dim() != 2 or any(t.dtype != torch.float32 or not t.is_cpu for t in tensors):
        add_product(weight, left, right, out=out)
    elif weight.is_contiguous() and out.is_contiguous():
        library.add_product(weight, left.contiguous(), right.contiguous(), out)
        torch.autograd.graph.increment_version(out)
    elif weight.mT.is_contiguous() and out.mT.is_contiguous():
        write_product(weight.mT, right.mT, left.mT, out.mT)
    else:
        add_product(weight, left, right, out=out)
