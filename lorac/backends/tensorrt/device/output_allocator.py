"""Memory for outputs whose sizes are known only once they are computed."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from lorac.backends.tensorrt.device.device_slots import allocate
from lorac.backends.tensorrt.device.io_tensors import IOTensor
from lorac.backends.tensorrt.library import TensorRTLibrary

Tensor = torch.Tensor


def output_allocator(library: TensorRTLibrary, io_tensor: IOTensor, device: torch.device) -> Any:
    """Return an allocator for one output, whose ``output()`` returns the output once the work was queued.

    The memory is torch's, of the stream that is current while the work is queued, and new in every call.
    """
    return _allocator_class(library)(io_tensor, device)


@functools.cache
def _allocator_class(library: TensorRTLibrary) -> Any:
    base = library.module.IOutputAllocator

    class Allocator(base):  # type: ignore[misc, valid-type]  # the base is known once the library is
        def __init__(self, io_tensor: IOTensor, device: torch.device) -> None:
            base.__init__(self)
            self.io_tensor, self.device = io_tensor, device
            self.memory: Tensor | None = None
            self.shape: tuple[int, ...] | None = None

        def reallocate_output(self, tensor_name: str, present: int, size: int, alignment: int) -> int:
            return self._given(size)

        def reallocate_output_async(
            self, tensor_name: str, present: int, size: int, alignment: int, stream: int
        ) -> int:
            return self._given(size)

        def notify_shape(self, tensor_name: str, shape: Any) -> None:
            self.shape = tuple(shape)

        def _given(self, size: int) -> int:
            try:
                self.memory = allocate((max(int(size), 1),), IOTensor(torch.uint8, ()), self.device)
            except torch.OutOfMemoryError:
                return 0  # no exception may pass through TensorRT, which takes 0 for a failure
            return self.memory.data_ptr()

        def output(self) -> Tensor:
            assert self.memory is not None and self.shape is not None
            size = math.prod(self.shape) * self.io_tensor.dtype.itemsize
            return self.memory[:size].view(self.io_tensor.dtype).view(self.shape)

    return Allocator
