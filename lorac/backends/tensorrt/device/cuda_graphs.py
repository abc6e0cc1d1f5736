"""CUDA graphs of an engine: a call is one launch, after inputs and slots were copied to the captured buffers.

A graph contains the addresses and shapes with which it was captured, and is valid until its context gets others. So
every set of shapes, including ranks of slots, has its own context, buffers and graph.

A capture costs as much as many calls, and a graph uses the memory of a context. So their number is limited, and a graph
is evicted only after a long idle time: calls that alternate among too many sets of shapes do not capture each time.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lorac.backends.tensorrt.device.device_slots import DeviceSlots, copy_to_engine
from lorac.backends.tensorrt.device.execution_slot import ExecutionSlot
from lorac.backends.tensorrt.device.interfaces import IOTensors
from lorac.errors import LoracError, Unavailable, warn

GraphKey = tuple[object, ...]
QueueWork = Callable[[int], None]
"""Queues an engine's work on a stream, given by its handle."""
Record = Callable[[QueueWork], Callable[[], None]]
"""(work) -> a function that repeats the work on the current stream."""
MAX_GRAPHS = 8
"""The most graphs at a time; each has the memory of a context."""
IDLE_CALLS = 1000
"""Calls without the least recently used graph after which another may take its place."""
RETRY_CALLS = 1000
"""Calls between attempts to capture a graph where memory lacks."""
GRAPHS_NOTE = (
    f"CUDA graphs: one for each of {MAX_GRAPHS} sets of sizes and ranks at a time; calls of other sets run without, "
    f"until a graph was not used for {IDLE_CALLS} calls"
)
_CAPTURING = threading.Lock()
"""Torch captures one graph at a time in a process."""


class CapturedCall:
    """One CUDA graph, with the buffers that it reads and writes.

    Args:
        execution: a context that only this graph uses.
        inputs: the inputs of a call, with the graph's shapes.
        slots: the slots of the call; fixed ones are read in place.
        record: a function that captures work.

    Attributes:
        last_call: the number of the engine's last call that used this graph.

    Raises:
        Unavailable, RuntimeError: the plan cannot be captured.
        InputMismatch: the plan does not support these sizes.
    """

    def __init__(
        self, execution: ExecutionSlot, inputs: Mapping[str, Tensor], slots: DeviceSlots, record: Record
    ) -> None:
        self.execution, self.last_call, self._lock = execution, 0, threading.Lock()
        self._holds: weakref.ref[DeviceSlots] | None = weakref.ref(slots)
        with execution.streams.acquire(inputs.values(), slots) as stream:
            self.inputs = self._copied(inputs)
            self.slots = slots if slots.fixed else DeviceSlots(self._copied(slots))
            execution.bind(self.inputs, self.slots)
            found = execution.outputs()
            self.outputs = {name: made for name, made in found.items() if made is not None}
            if len(self.outputs) < len(found) or any(io_tensor.on_host for io_tensor in execution.io.outputs.values()):
                raise RuntimeError("sizes of its outputs depend on values, or are outputs")
            # The first run with new shapes may do work that cannot be captured.
            execution.queue(stream)
            if execution.library.is_rtx and not execution.context.is_stream_capturable(stream):
                raise RuntimeError("it allocates while it runs")
            self._replay = record(execution.queue)

    def run(self, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> dict[str, Tensor]:
        """Run one call."""
        with self._lock, self.execution.streams.acquire(inputs.values(), slots):
            for name, tensor in inputs.items():
                self.inputs[name].copy_(tensor)
            self._hold(slots)
            self._replay()
            given = {name: tensor.clone() for name, tensor in self.outputs.items()}
        self.execution.streams.retain_outputs(given.values())
        return given

    def drop(self) -> None:
        """Wait for queued work; called before the graph is released."""
        with self._lock:
            self.execution.streams.finish()

    def _copied(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        io = self.execution.io.inputs
        return {
            name: copy_to_engine(tensor, io[name], self.execution.device)
            for name, tensor in tensors.items()
            if name in io
        }

    def _hold(self, slots: DeviceSlots) -> None:
        """Copy a choice's slots into the buffers, unless the buffers already contain them."""
        if self.slots is slots or (self._holds is not None and self._holds() is slots):
            return
        self._holds = None
        for name, buffer in self.slots.items():
            buffer.copy_(slots[name])
        self._holds = weakref.ref(slots)


class CudaGraphCache:
    """The CUDA graphs of one engine, by shapes.

    Args:
        io: the engine's inputs and outputs.
        execution: a function that makes a context for a new graph.
        record: a function that captures work.
    """

    def __init__(self, io: IOTensors, execution: Callable[[], ExecutionSlot], record: Record) -> None:
        self.io, self._new_execution, self._record = io, execution, record
        self._known: OrderedDict[GraphKey, CapturedCall] = OrderedDict()
        self._calls = self._postponed = 0
        self._lock = threading.Lock()
        self._refused = False

    def find(self, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> CapturedCall | None:
        """Return the graph for a call, and capture it on first use; return None if the call should run without one.

        Warn if the plan cannot be captured, or if there is not enough memory.

        Raises:
            InputMismatch: the plan does not support these sizes.
        """
        if self._refused:
            return None
        key = self._key(inputs, slots)
        found = self._used(key)
        if found is not None or not self._has_room():
            return found
        with _CAPTURING:
            found = self._used(key)
            return self._capture(key, inputs, slots) if found is None and self._has_room() else found

    def executions(self) -> list[ExecutionSlot]:
        """Return the contexts of all graphs."""
        with self._lock:
            return [graph.execution for graph in self._known.values()]

    def _key(self, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> GraphKey:
        """Return a graph's key: shapes, values from which shapes are computed, and addresses of fixed memory."""
        sizes = tuple((name, tuple(tensor.shape)) for given in (inputs, slots) for name, tensor in given.items())
        numbers = tuple(tuple(t.flatten().tolist()) for name, t in inputs.items() if self.io.inputs[name].on_host)
        return (sizes, numbers, tuple(tensor.data_ptr() for tensor in slots.values()) if slots.fixed else ())

    def _used(self, key: GraphKey) -> CapturedCall | None:
        """Return a known graph, and count the call."""
        with self._lock:
            self._calls += 1
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
                found.last_call = self._calls
            return found

    def _has_room(self) -> bool:
        """Return whether a graph may be captured now: there is room, or the least recently used graph is idle."""
        with self._lock:
            full = len(self._known) >= MAX_GRAPHS
            room = not full or self._calls - next(iter(self._known.values())).last_call > IDLE_CALLS
            return room and self._calls >= self._postponed and not self._refused

    def _capture(self, key: GraphKey, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> CapturedCall | None:
        """Capture a call; if memory is short, postpone captures, and stop them if the plan cannot be captured."""
        try:
            made = CapturedCall(self._new_execution(), inputs, slots, self._record)
        except (Unavailable, RuntimeError) as error:
            reason = error.what if isinstance(error, LoracError) else str(error)
            # torch, TensorRT or CUDA may report the lack of memory.
            if isinstance(error, torch.OutOfMemoryError | Unavailable) or "out of memory" in str(error):
                self._postponed = self._calls + RETRY_CALLS
                warn(
                    f"there is no memory for another CUDA graph, and calls run without: {reason}",
                    next_step="free some of the GPU's memory, or compile for smaller sizes",
                )
            else:
                self._refused = True
                warn(
                    f"no CUDA graph can be made of the plan, which runs without: {reason}",
                    next_step="compile without CUDA graphs, and nothing changes but this warning",
                )
            return None
        with self._lock:
            self._known[key], made.last_call = made, self._calls
            dropped = [self._known.popitem(last=False)[1] for _ in range(len(self._known) - MAX_GRAPHS)]
        for old in dropped:
            old.drop()
        return made


def record_on_cuda(work: QueueWork) -> Callable[[], None]:
    """Capture work into a CUDA graph, on the current stream; return a function that replays it.

    Work of other threads is not captured in the meantime, and may allocate memory.

    Raises:
        RuntimeError: CUDA cannot capture the work.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work(stream.cuda_stream)
    return graph.replay
