"""The CUDA streams on which a context's work is queued, one call after another."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from lorac.backends.tensorrt.device.device_slots import DeviceSlots, keep_alive_for


class StreamQueue:
    """The stream of a context's work: the caller's, or a separate one if the caller is on the default stream.

    On the default stream, TensorRT waits for the whole device in every call. A context has one memory for intermediate
    values, so work on one stream waits for earlier work on another.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def acquire(self, inputs: Iterable[Tensor], slots: DeviceSlots) -> Iterator[int]:
        """Make the stream for a call the current stream inside the block, and yield its handle.

        After the block, the caller's stream waits for the work that was queued in it.

        Args:
            inputs, slots: the tensors that the call reads; their memory is not reused before the call ends.
        """
        caller = torch.cuda.current_stream(self.device)
        stream = self._own if caller == torch.cuda.default_stream(self.device) else caller
        if stream != caller:
            stream.wait_stream(caller)
        if self._last is not None:
            stream.wait_event(self._last)
        slots.wait_on(stream)
        for tensor in inputs:
            keep_alive_for(tensor, stream)
        try:
            with torch.cuda.stream(stream):
                yield stream.cuda_stream
        finally:
            self._last = stream.record_event()
            caller.wait_event(self._last)

    def retain_outputs(self, outputs: Iterable[Tensor]) -> None:
        """Keep the memory of outputs made inside ``acquire``'s block while the caller's stream reads them."""
        caller = torch.cuda.current_stream(self.device)
        for tensor in outputs:
            keep_alive_for(tensor, caller)

    def finish(self) -> None:
        """Wait for queued work."""
        if self._last is not None:
            self._last.synchronize()


def finish_device(device: torch.device) -> None:
    """Wait for all work that is queued on a GPU; return at once for the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
