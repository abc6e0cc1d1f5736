"""CUDA graphs of an engine: a call is one launch, with inputs and slots copied to where it was captured.

A graph has the addresses and shapes in it that it was captured with, and is valid for as long as its context is not
told others. So every set of shapes, ranks of slots among them, has a context, buffers and a graph of its own.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch

from lorac.backends.tensorrt.device.device_slots import DeviceSlots, copy_to_engine
from lorac.backends.tensorrt.device.execution_slot import ExecutionSlot
from lorac.backends.tensorrt.device.io_tensors import IOTensors
from lorac.backends.tensorrt.library import is_rtx
from lorac.errors import LoracError, Unavailable, warn

Tensor = torch.Tensor
GraphKey = tuple[object, ...]
QueueWork = Callable[[int], None]
"""What queues an engine's work on a stream, by its handle."""
Record = Callable[[QueueWork], Callable[[], None]]
"""(work) -> what does that work again, on the stream that is then current."""
MAX_GRAPHS = 8
"""How many sets of shapes have a graph at a time: each takes the memory of a context."""
_CAPTURING = threading.Lock()
"""Torch captures one graph at a time in a process."""


class CapturedCall:
    """One graph, with the buffers that it reads and writes.

    Args:
        lane: a context that nobody else uses.
        inputs: a call's inputs, of the shapes that the graph is for.
        slots: its slots; those that are fixed are read where they lie.
        record: captures work.

    Raises:
        Unavailable, RuntimeError: the plan cannot be captured.
        InputMismatch: it does not take these sizes.
    """

    def __init__(self, lane: ExecutionSlot, inputs: Mapping[str, Tensor], slots: DeviceSlots, record: Record) -> None:
        self.lane, self._lock = lane, threading.Lock()
        self._holds: weakref.ref[DeviceSlots] | None = weakref.ref(slots)
        with lane.track.turn(inputs.values(), slots) as stream:
            self.inputs = self._copied(inputs)
            self.slots = slots if slots.fixed else DeviceSlots(self._copied(slots))
            lane.point(self.inputs, self.slots)
            found = lane.outputs()
            self.outputs = {name: made for name, made in found.items() if made is not None}
            if len(self.outputs) < len(found) or any(port.on_host for port in lane.ports.outputs.values()):
                raise RuntimeError("sizes of its outputs depend on values, or are outputs")
            # What new shapes leave to be done is done by the first run, and may be what cannot be captured.
            lane.queue(stream)
            if is_rtx() and not lane.context.is_stream_capturable(stream):
                raise RuntimeError("it allocates while it runs")
            self._replay = record(lane.queue)

    def run(self, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> dict[str, Tensor]:
        """One call."""
        with self._lock, self.lane.track.turn(inputs.values(), slots):
            for name, tensor in inputs.items():
                self.inputs[name].copy_(tensor)
            self._hold(slots)
            self._replay()
            given = {name: tensor.clone() for name, tensor in self.outputs.items()}
        self.lane.track.hand_over(given.values())
        return given

    def drop(self) -> None:
        """Wait for what was queued, before it is let go."""
        with self._lock:
            self.lane.track.finish()

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ports = self.lane.ports.inputs
        return {
            name: copy_to_engine(tensor, ports[name], self.lane.device)
            for name, tensor in tensors.items()
            if name in ports
        }

    def _hold(self, slots: DeviceSlots) -> None:
        """Copy a choice's slots into the buffers, where they hold another's."""
        if self.slots is slots or (self._holds is not None and self._holds() is slots):
            return
        self._holds = None
        for name, buffer in self.slots.items():
            buffer.copy_(slots[name])
        self._holds = weakref.ref(slots)


class CudaGraphCache:
    """The graphs of one engine by shapes, those that were used last.

    Args:
        ports: what the engine takes and gives.
        lane: makes a context for a new one.
        record: captures work.
    """

    def __init__(self, ports: IOTensors, lane: Callable[[], ExecutionSlot], record: Record) -> None:
        self.ports, self._lane, self._record = ports, lane, record
        self._known: OrderedDict[GraphKey, CapturedCall] = OrderedDict()
        self._lock = threading.Lock()
        self._refused = False

    def serving(self, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> CapturedCall | None:
        """The graph for a call, captured where there is none yet; None where the plan cannot be: warned of once.

        Raises:
            InputMismatch: the plan does not take these sizes.
        """
        if self._refused:
            return None
        key = self._key(inputs, slots)
        found = self._used(key)
        if found is not None:
            return found
        with _CAPTURING:
            found = self._used(key)
            return self._capture(key, inputs, slots) if found is None else found

    def lanes(self) -> list[ExecutionSlot]:
        """Their contexts."""
        with self._lock:
            return [graph.lane for graph in self._known.values()]

    def _key(self, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> GraphKey:
        """What a graph is for: all shapes, the numbers that shapes are computed from, and memory that is fixed."""
        sizes = tuple((name, tuple(tensor.shape)) for given in (inputs, slots) for name, tensor in given.items())
        numbers = tuple(tuple(t.flatten().tolist()) for name, t in inputs.items() if self.ports.inputs[name].on_host)
        return (sizes, numbers, tuple(tensor.data_ptr() for tensor in slots.values()) if slots.fixed else ())

    def _used(self, key: GraphKey) -> CapturedCall | None:
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
            return found

    def _capture(self, key: GraphKey, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> CapturedCall | None:
        try:
            made = CapturedCall(self._lane(), inputs, slots, self._record)
        except (Unavailable, RuntimeError) as error:
            self._refused = True
            warn(
                f"no CUDA graph can be made of the plan, which runs without: {_reason(error)}",
                next_step="compile without CUDA graphs, and nothing changes but this warning",
            )
            return None
        with self._lock:
            self._known[key] = made
            dropped = [self._known.popitem(last=False)[1] for _ in range(len(self._known) - MAX_GRAPHS)]
        for old in dropped:
            old.drop()
        return made


def record_on_cuda(work: QueueWork) -> Callable[[], None]:
    """Capture work into a CUDA graph, on the stream that is current.

    Other threads may go on meanwhile: what they do is not captured, and may allocate.

    Raises:
        RuntimeError: CUDA cannot capture it.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work(stream.cuda_stream)
    return graph.replay


def _reason(error: Exception) -> str:
    return error.what if isinstance(error, LoracError) else str(error)
