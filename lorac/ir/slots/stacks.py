"""Equally shaped tensors at equal distances in memory, so that one copy moves them all.

Hundreds of copies of one tensor each take up to twice as long as one copy of the same number of bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: torch's alignment of allocations, so that kernels compute the same in every tensor of a stack."""


@dataclass(frozen=True)
class StackShape:
    """Tensors of one shape and dtype, each of which begins at a multiple of 64 bytes.

    Attributes:
        count: the number of tensors.
        shape: the shape of each tensor.
    """

    count: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def step(self) -> int:
        """The number of elements between the beginnings of two neighbouring tensors."""
        unit = max(ALIGNMENT // self.dtype.itemsize, 1)
        return -(-math.prod(self.shape) // unit) * unit

    @property
    def nbytes(self) -> int:
        """The size of all tensors in memory, in bytes."""
        return self.count * self.step * self.dtype.itemsize

    def view(self, memory: Tensor) -> Tensor:
        """View memory as the stack (count, …)."""
        steps = memory.view(self.dtype).view(self.count, self.step)
        return steps[:, : math.prod(self.shape)].view(self.count, *self.shape)

    def new(self) -> Tensor:
        """Allocate an uninitialised stack (count, …)."""
        return self.view(new_memory(self.nbytes))


def new_memory(nbytes: int) -> Tensor:
    """Allocate uninitialised bytes, aligned as torch aligns them.

    NumPy requests huge pages, in which the first write takes half the time.
    """
    memory = torch.from_numpy(np.empty(nbytes + ALIGNMENT, np.uint8))
    begin = -memory.data_ptr() % ALIGNMENT
    return memory[begin : begin + nbytes]


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.dtype, tensor.stride(), tensor.untyped_storage().data_ptr()


def find_stacks(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return all tensors in order, as one strided view (count, …) per run of evenly spaced tensors."""
    runs: list[tuple[Tensor, int, int]] = []  # the first tensor, the step, and the number of tensors
    for tensor in tensors:
        if runs and _memory(runs[-1][0]) == _memory(tensor):
            first, step, count = runs[-1]
            apart = int(tensor.storage_offset()) - int(first.storage_offset())
            if apart >= 0 and (count == 1 or apart == count * step):
                runs[-1] = (first, apart if count == 1 else step, count + 1)
                continue
        runs.append((tensor, 0, 1))
    return [
        first.as_strided((count, *first.shape), (step, *first.stride()), first.storage_offset())
        for first, step, count in runs
    ]
