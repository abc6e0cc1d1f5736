"""Tensors in the form that an engine reads: on its device, contiguous and aligned, in its dtype."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lorac.backends.tensorrt.device.interfaces import IOTensor

ALIGNMENT = 256
"""Addresses are multiples of this many bytes (``IExecutionContext::setTensorAddress``)."""


class DeviceSlots(Mapping[str, Tensor]):
    """The slot tensors of a choice of adapters, laid out once and read by many calls.

    Args:
        tensors: slot input -> tensor, which work on the current stream lays out.
        fixed: whether the tensors keep their addresses, and later writes to them affect calls. A CUDA graph then reads
            them in place, without copies.
        ready: further events that must complete before the tensors are ready.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], *, fixed: bool = False, ready: Iterable[torch.cuda.Event] = ()
    ) -> None:
        self._tensors, self.fixed = dict(tensors), fixed
        self._ready = {*ready, *record_event(self._tensors.values())}
        self._passed: set[int] = set()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def wait_on(self, stream: torch.cuda.Stream) -> None:
        """Make a stream wait for the tensors, and keep their memory until it has read them; done once per stream."""
        if stream.cuda_stream in self._passed:
            return
        for event in self._ready:
            stream.wait_event(event)
        for tensor in self._tensors.values():
            keep_alive_for(tensor, stream)
        self._passed.add(stream.cuda_stream)


class TensorLayouts:
    """Copies of tensors in the layout of an engine, at most one per tensor.

    Args:
        device: the engine's device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = WeakTensorKeyDictionary()

    def lay_out(self, tensors: Mapping[str, Tensor], io: Mapping[str, IOTensor], *, fixed: bool = False) -> DeviceSlots:
        """Return slots: tensors that the engine can read in place, and copies of the others.

        Args:
            tensors: slot input -> tensor.
            io: the engine's inputs.
            fixed: as for ``DeviceSlots``.
        """
        laid_out, ready = dict[str, Tensor](), set[torch.cuda.Event]()
        for name, tensor in tensors.items():
            if is_readable(tensor, io[name], self.device):
                laid_out[name] = tensor.detach()
                continue
            known: tuple[Tensor, tuple[torch.cuda.Event, ...]] | None = self._copies.get(tensor)
            if known is None or known[0].dtype != io[name].dtype:
                made = copy_to_engine(tensor, io[name], self.device)
                known = self._copies[tensor] = (made, record_event([made]))  # after which any thread may read the copy
            laid_out[name] = known[0]
            ready.update(known[1])
        return DeviceSlots(laid_out, fixed=fixed, ready=ready)


def is_readable(tensor: Tensor, io_tensor: IOTensor, device: torch.device) -> bool:
    """Return whether the engine can read a tensor in place."""
    there = tensor.device == (torch.device("cpu") if io_tensor.on_host else device)
    aligned = io_tensor.on_host or not tensor.data_ptr() % ALIGNMENT
    return there and aligned and tensor.dtype == io_tensor.dtype and tensor.is_contiguous()


def copy_to_engine(tensor: Tensor, io_tensor: IOTensor, device: torch.device, *, staged: bool = False) -> Tensor:
    """Return a copy of a tensor that the engine can read.

    Args:
        tensor: any tensor.
        io_tensor: the input of the engine that reads the copy.
        device: the engine's device.
        staged: whether a CPU tensor is copied through pinned memory, so the caller does not wait for the GPU.
    """
    tensor, made = tensor.detach(), allocate(tensor.shape, io_tensor, device)
    if not staged or made.device == tensor.device or tensor.device.type != "cpu":
        return made.copy_(tensor)
    pinned = tensor.pin_memory()
    # A tensor that is already pinned is the caller's, who may write to it after the call returns.
    return made.copy_(pinned, non_blocking=pinned.data_ptr() != tensor.data_ptr())


def allocate(shape: Sequence[int], io_tensor: IOTensor, device: torch.device) -> Tensor:
    """Return an uninitialised tensor that an engine can read or write.

    torch's allocator aligns tensors, but a custom allocator may not.
    """
    place = torch.device("cpu") if io_tensor.on_host else device
    made = torch.empty(tuple(shape), dtype=io_tensor.dtype, device=place)
    if io_tensor.on_host or not made.data_ptr() % ALIGNMENT:
        return made
    whole = torch.empty(made.nbytes + ALIGNMENT, dtype=torch.uint8, device=place)
    start = -whole.data_ptr() % ALIGNMENT
    return whole[start : start + made.nbytes].view(io_tensor.dtype).view(made.shape)


def keep_alive_for(tensor: Tensor, stream: torch.cuda.Stream) -> None:
    """Keep a tensor's memory until a stream has completed the work that is queued on it now."""
    if tensor.is_cuda:
        tensor.record_stream(stream)


def record_event(tensors: Iterable[Tensor]) -> tuple[torch.cuda.Event, ...]:
    """Record an event on the current stream, after which tensors are ready; none if no tensor is on a GPU."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    return tuple(torch.cuda.current_stream(device).record_event() for device in devices)
