"""The CUDA streams that a context's work is queued on, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch

from lorac.backends.tensorrt.device.device_slots import DeviceSlots, keep_alive_for

Tensor = torch.Tensor


class StreamQueue:
    """Where a context's work goes: the caller's stream, or one of its own where the caller is on the default stream.

    On the default stream TensorRT waits for the whole device in every call. A context has one memory for what it
    computes, so what is queued with it on one stream waits for what was queued on another.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._own = torch.cuda.Stream(device)
        self._last: torch.cuda.Event | None = None

    @contextlib.contextmanager
    def turn(self, inputs: Iterable[Tensor], slots: DeviceSlots) -> Iterator[int]:
        """As ``Turns``."""
        caller = torch.cuda.current_stream(self.device)
        stream = self._own if caller == torch.cuda.default_stream(self.device) else caller
        self._begin(stream, caller, inputs, slots)
        try:
            with torch.cuda.stream(stream):
                yield stream.cuda_stream
        finally:
            self._last = stream.record_event()
            caller.wait_event(self._last)

    def _begin(
        self, stream: torch.cuda.Stream, caller: torch.cuda.Stream, inputs: Iterable[Tensor], slots: DeviceSlots
    ) -> None:
        """Have a stream wait for all that a call on it reads and writes, and memory for the stream."""
        if stream != caller:
            stream.wait_stream(caller)
        if self._last is not None:
            stream.wait_event(self._last)
        slots.read_on(stream)
        for tensor in inputs:
            keep_alive_for(tensor, stream)

    def hand_over(self, outputs: Iterable[Tensor]) -> None:
        """As ``Turns``."""
        caller = torch.cuda.current_stream(self.device)
        for tensor in outputs:
            keep_alive_for(tensor, caller)

    def finish(self) -> None:
        """As ``Turns``."""
        if self._last is not None:
            self._last.synchronize()
