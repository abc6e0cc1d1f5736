"""Tensors as an engine reads them: on its device, contiguous and aligned, in its dtype."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lorac.backends.tensorrt.device.io_tensors import IOTensor

Tensor = torch.Tensor
ALIGNMENT = 256
"""Addresses are multiples of this many bytes (``IExecutionContext::setTensorAddress``)."""


class DeviceSlots(Mapping[str, Tensor]):
    """The slot tensors of a choice of adapters, laid out once and read by many calls.

    Args:
        tensors: slot input -> tensor, laid out.
        fixed: whether they keep their addresses, and calls read what is written into them. A CUDA graph reads them
            there, and copies nothing.
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

    def wait_on(self, stream: torch.cuda.Stream) -> None:
        """Make a stream wait for the tensors and keep their memory until it has read them; once per stream."""
        if stream.cuda_stream in self._passed:
            return
        if self._ready is not None:
            stream.wait_event(self._ready)
        for tensor in self._tensors.values():
            keep_alive_for(tensor, stream)
        self._passed.add(stream.cuda_stream)


class TensorLayouts:
    """Copies of tensors laid out for an engine, at most one of each.

    Args:
        device: the engine's.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = WeakTensorKeyDictionary()

    def lay_out(self, tensor: Tensor, io_tensor: IOTensor) -> Tensor:
        """Return the tensor if the engine can read it where it lies, else a copy."""
        if is_readable(tensor, io_tensor, self.device):
            return tensor.detach()
        known = self._copies.get(tensor)
        if known is None or known.dtype != io_tensor.dtype:
            known = self._copies[tensor] = copy_to_engine(tensor, io_tensor, self.device)
        return known


def is_readable(tensor: Tensor, io_tensor: IOTensor, device: torch.device) -> bool:
    """Return whether the engine can read a tensor where it lies."""
    there = tensor.device == (torch.device("cpu") if io_tensor.on_host else device)
    aligned = io_tensor.on_host or not tensor.data_ptr() % ALIGNMENT
    return there and aligned and tensor.dtype == io_tensor.dtype and tensor.is_contiguous()


def copy_to_engine(tensor: Tensor, io_tensor: IOTensor, device: torch.device) -> Tensor:
    """Return a copy that the engine can read."""
    return allocate(tensor.shape, io_tensor, device).copy_(tensor.detach())


def allocate(shape: Sequence[int], io_tensor: IOTensor, device: torch.device) -> Tensor:
    """Return an uninitialised tensor that an engine can read or write.

    torch's allocator aligns tensors; a custom one need not.
    """
    place = torch.device("cpu") if io_tensor.on_host else device
    made = torch.empty(tuple(shape), dtype=io_tensor.dtype, device=place)
    if io_tensor.on_host or not made.data_ptr() % ALIGNMENT:
        return made
    whole = torch.empty(made.nbytes + ALIGNMENT, dtype=torch.uint8, device=place)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + made.nbytes].view(io_tensor.dtype).view(made.shape)


def keep_alive_for(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    """Keep a tensor's memory until a stream has done the work that is queued on it now."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


def _ready_event(tensors: Mapping[str, Tensor]) -> torch.cuda.Event | None:
    """Return the event after which tensors are ready, or None if none of them is on a GPU."""
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    return torch.cuda.current_stream(devices.pop()).record_event() if devices else None
