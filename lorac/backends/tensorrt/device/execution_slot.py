"""One context of an engine, with its last shapes and addresses; it runs calls."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorac.backends.tensorrt.device.device_slots import ALIGNMENT, DeviceSlots, allocate
from lorac.backends.tensorrt.device.interfaces import ExecutionContext, IOTensor, IOTensors
from lorac.backends.tensorrt.device.stream_queue import StreamQueue
from lorac.backends.tensorrt.library import TensorRTLibrary, collect_errors
from lorac.errors import InputMismatch, Unavailable

if TYPE_CHECKING:
    import tensorrt


class ExecutionSlot:
    """A context, which runs one call at a time.

    Shapes and addresses are recorded once TensorRT has accepted them, and a call sets only those that differ. So a swap
    sets only the slots' addresses, and a call that fails halfway leaves no state that a later call would reuse.

    Args:
        context: TensorRT's context.
        io: the inputs and outputs of its engine.
        device: the device of its tensors.
        streams: the streams on which its work is queued.
        library: the library that made the context.

    Attributes:
        shape_changes: the number of times that its shapes changed.
    """

    def __init__(
        self,
        context: ExecutionContext,
        io: IOTensors,
        device: torch.device,
        streams: StreamQueue,
        library: TensorRTLibrary,
    ) -> None:
        self.context, self.io, self.device, self.streams, self.library = context, io, device, streams, library
        self.shape_changes = 0
        self._new_shapes = True
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._slots: weakref.ref[DeviceSlots] | None = None
        # An empty tensor has no address, and TensorRT treats a missing address as a missing input.
        self._nothing = allocate((ALIGNMENT,), IOTensor(torch.uint8, ()), device)
        self._allocators: dict[str, tensorrt.IOutputAllocator] = {}

    def bind(self, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> None:
        """Set those addresses and shapes of a call's inputs and slots that differ from the context's.

        Raises:
            InputMismatch: the plan was not built for a size.
            Unavailable: TensorRT refuses an address, or an input is missing.
        """
        if self._slots is None or self._slots() is not slots:
            self._slots = None
            self._bind(slots.items())
            self._slots = weakref.ref(slots)
        self._bind(inputs.items())
        if self._new_shapes or any(io_tensor.on_host for io_tensor in self.io.inputs.values()):
            with collect_errors() as messages:
                try:
                    lacking = self.context.infer_shapes()
                except RuntimeError as error:
                    raise InputMismatch(
                        f"TensorRT finds no sizes for the outputs: {messages.why() if messages.errors else error}",
                        next_step="give inputs whose sizes go together, as the model takes them",
                    ) from error
                if lacking:
                    raise InputMismatch(
                        f"the plan reads {', '.join(lacking)}, and the call gives no such input",
                        next_step="give every input that the program takes",
                    )
        self.shape_changes += self._new_shapes
        self._new_shapes = False

    def outputs(self) -> dict[str, Tensor | None]:
        """Allocate memory for every output; None for an output that is allocated while it is computed."""
        found: dict[str, Tensor | None] = {}
        for name, io_tensor in self.io.outputs.items():
            shape = tuple(self.context.get_tensor_shape(name))
            if any(size < 0 for size in shape):
                self._allocators[name] = allocator_class(self.library)(io_tensor, self.device)
                self.context.set_output_allocator(name, self._allocators[name])
                found[name] = None
            else:
                found[name] = made = allocate(shape, io_tensor, self.device)
                self._set_address(name, made.data_ptr())
        return found

    def queue(self, stream: int) -> None:
        """Queue the work on a stream, given by handle.

        Raises:
            Unavailable: TensorRT cannot run the plan.
        """
        with collect_errors() as messages:
            if not self.context.execute_async_v3(stream):
                raise Unavailable(
                    f"TensorRT cannot run the plan: {messages.why()}",
                    next_step="if the GPU's memory is full, free some of it or give smaller batches",
                )

    def run(self, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> dict[str, Tensor]:
        """Run one call; the outputs are ready for the caller's stream."""
        with self.streams.acquire(inputs.values(), slots) as stream:
            self.bind(inputs, slots)
            found = self.outputs()
            self.queue(stream)
            given = {name: self._allocators[name].output() if made is None else made for name, made in found.items()}
        self.streams.retain_outputs(given.values())
        if any(io_tensor.on_host for io_tensor in self.io.outputs.values()):
            self.streams.finish()
        return given

    def _bind(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            if name not in self.io.inputs:
                continue
            shape = tuple(tensor.shape)
            if self._shapes.get(name) != shape:
                self._shapes.pop(name, None)
                self._new_shapes = True
                with collect_errors() as messages:
                    if not self.context.set_input_shape(name, shape):
                        raise InputMismatch(
                            f"TensorRT does not take '{name}' of shape {shape}: {messages.why()}",
                            next_step="compile with dynamic_shapes= and example_inputs= that admit this shape; the "
                            f"plan was built for shapes like {self.io.inputs[name].shape}",
                        )
                self._shapes[name] = shape
            self._set_address(name, tensor.data_ptr())

    def _set_address(self, name: str, address: int) -> None:
        address = address or self._nothing.data_ptr()
        if self._addresses.get(name) == address:
            return
        self._addresses.pop(name, None)
        with collect_errors() as messages:
            if not self.context.set_tensor_address(name, address):
                raise Unavailable(
                    f"TensorRT does not take the memory of '{name}': {messages.why()}",
                    next_step="this is a bug of lorac's, not of your model",
                )
        self._addresses[name] = address


@functools.cache
def allocator_class(library: TensorRTLibrary) -> Any:
    """Return the class of allocators for one output; their ``output()`` returns the output after the work was queued.

    The memory belongs to torch, on the stream that is current while the work is queued, and is new in every call.
    """
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

        def notify_shape(self, tensor_name: str, shape: tensorrt.Dims) -> None:
            self.shape = tuple(shape)

        def _given(self, size: int) -> int:
            try:
                self.memory = allocate((max(int(size), 1),), IOTensor(torch.uint8, ()), self.device)
            except torch.OutOfMemoryError:
                return 0  # an exception must not pass through TensorRT, which treats 0 as a failure
            return self.memory.data_ptr()

        def output(self) -> Tensor:
            assert self.memory is not None and self.shape is not None
            size = math.prod(self.shape) * self.io_tensor.dtype.itemsize
            return self.memory[:size].view(self.io_tensor.dtype).view(self.shape)

    return Allocator
