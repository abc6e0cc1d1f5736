"""Tensors as an engine reads them: in its memory, contiguous and aligned, in its dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lorac.backends.tensorrt.device.io_tensors import IOTensor

Tensor = torch.Tensor
ALIGNMENT = 256
"""Bytes that an address has to be a multiple of (``IExecutionContext::setTensorAddress``)."""


class DeviceSlots(Mapping[str, Tensor]):
    """What a choice of adapters puts into an engine's slot inputs, laid out once and read by many calls.

    Args:
        tensors: slot input -> tensor, laid out.
        fixed: they stay where they are for good, and what is written into them is what calls read. A CUDA graph then
            reads them there, and nothing is copied for it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, fixed: bool = False) -> None:
        self._tensors, self.fixed = dict(tensors), fixed
        self._ready = _ready_event(self._tensors)
        self._passed: set[int] = set()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read_on(self, stream: torch.cuda.Stream) -> None:
        """Have a stream wait for them, and their memory wait for the stream when it is let go; once per stream."""
        if stream.cuda_stream in self._passed:
            return
        if self._ready is not None:
            stream.wait_event(self._ready)
        for tensor in self._tensors.values():
            keep_alive_for(tensor, stream)
        self._passed.add(stream.cuda_stream)


class TensorLayouts:
    """Tensors laid out for an engine; of one tensor there is one copy, whoever asks.

    Args:
        device: whose memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = WeakTensorKeyDictionary()

    def laid_out(self, tensor: Tensor, port: IOTensor) -> Tensor:
        """The tensor as the engine reads it: itself where it lies so, else a copy."""
        if is_readable(tensor, port, self.device):
            return tensor.detach()
        known = self._copies.get(tensor)
        if known is None or known.dtype != port.dtype:
            known = self._copies[tensor] = copy_to_engine(tensor, port, self.device)
        return known


def is_readable(tensor: Tensor, port: IOTensor, device: torch.device) -> bool:
    """Whether the engine can read a tensor where it lies."""
    there = tensor.device == (torch.device("cpu") if port.on_host else device)
    aligned = port.on_host or not tensor.data_ptr() % ALIGNMENT
    return there and aligned and tensor.dtype == port.dtype and tensor.is_contiguous()


def copy_to_engine(tensor: Tensor, port: IOTensor, device: torch.device) -> Tensor:
    """A new tensor that the engine can read."""
    return allocate(tensor.shape, port, device).copy_(tensor.detach())


def allocate(shape: Sequence[int], port: IOTensor, device: torch.device) -> Tensor:
    """A tensor that an engine can read or write, of any content.

    What torch's allocator gives is aligned; what one gives that took its place need not be.
    """
    place = torch.device("cpu") if port.on_host else device
    made = torch.empty(tuple(shape), dtype=port.dtype, device=place)
    if port.on_host or not made.data_ptr() % ALIGNMENT:
        return made
    whole = torch.empty(made.nbytes + ALIGNMENT, dtype=torch.uint8, device=place)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + made.nbytes].view(port.dtype).view(made.shape)


def keep_alive_for(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    """Have a tensor's memory not be used again before a stream has passed the work that was queued by then."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


def _ready_event(tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
    """What tells that tensors are made, on the stream that makes them; None where there is none to wait for."""
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    return torch.cuda.current_stream(devices.pop()).record_event() if devices else None
