"""Writes into weights, with lorac-native's functions where it is installed."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from lorac.ir.algebra.changes import add_product
from lorac.native_library import find_native_library


class SparseWrites:
    """Sparse writes into weights that run together, so that all cores share them even if each weight has few."""

    def __init__(self) -> None:
        self._by_memory: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        self._actions: list[Callable[[], None]] = []

    def add(self, memory: Tensor, positions: Tensor, values: Tensor) -> None:
        """Add a write of values at distinct, ascending positions (int64) of a contiguous tensor of the same dtype.

        It runs after earlier writes to the tensor.
        """
        self._by_memory.setdefault(id(memory), []).append((memory, positions, values))

    def then(self, action: Callable[[], None]) -> None:
        """Add an action that runs after all writes."""
        self._actions.append(action)

    def run(self) -> None:
        """Run all writes, then the actions."""
        library = find_native_library()
        by_size: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for memory, positions, values in itertools.chain.from_iterable(self._by_memory.values()):
            if library is None or not memory.is_cpu:
                memory.view(-1).index_put_((positions,), values)
            else:
                by_size.setdefault(memory.element_size(), []).append((memory, positions, values))
        for item_bytes, writes in by_size.items():
            assert library is not None
            library.scatter(writes, item_bytes)
            # Autograd does not see the writes; raise the version, so that it refuses a backward pass over the old
            # values.
            torch.autograd.graph.increment_version([memory for memory, _, _ in writes])
        for action in self._actions:
            action()


def write_product(weight: Tensor, left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write W + left·right to ``out``, for matrices (n, R) and (R, m) or stacks of them."""
    library = find_native_library()
    tensors = (weight, left, right, out)
    plain = weight.dim() == 2 and all(t.dtype == torch.float32 and t.is_cpu for t in tensors)
    if library is not None and plain and weight.is_contiguous() and out.is_contiguous():
        left, right = (factor if factor.mT.is_contiguous() else factor.contiguous() for factor in (left, right))
        library.add_product(weight, left, right, out)
        torch.autograd.graph.increment_version(out)
    elif library is not None and plain and weight.mT.is_contiguous() and out.mT.is_contiguous():
        write_product(weight.mT, right.mT, left.mT, out.mT)
    else:
        add_product(weight, left, right, out=out)
