"""One context of an engine: what it was told last, and a call with it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from lorac.backends.tensorrt.device.device_slots import ALIGNMENT, DeviceSlots, allocate
from lorac.backends.tensorrt.device.interfaces import ExecutionContext
from lorac.backends.tensorrt.device.io_tensors import IOTensor, IOTensors
from lorac.backends.tensorrt.device.output_allocator import output_allocator
from lorac.backends.tensorrt.library import collect_errors
from lorac.errors import InputMismatch, Unavailable

Tensor = torch.Tensor


class StreamOrder(Protocol):
    """The streams that a context's work goes to, one call after the other."""

    def turn(self, inputs: Iterable[Tensor], slots: DeviceSlots) -> AbstractContextManager[int]:
        """The handle of the stream to queue a call on, which is current inside the block.

        The caller's stream waits for what was queued when the block ends.

        Args:
            inputs: tensors that the call reads; their memory stays until it has passed.
            slots: the same.
        """

    def hand_over(self, outputs: Iterable[Tensor]) -> None:
        """Have the memory of outputs, made inside a turn, stay for as long as the caller's stream reads it."""

    def finish(self) -> None:
        """Wait for what was queued."""


class ExecutionSlot:
    """A context, for one call at a time.

    What it was told last is noted by addresses and shapes, and only once TensorRT took it. A call tells it what
    differs: a swap sets the slots' addresses and nothing else, and a call that fails half-way leaves nothing behind
    that another one would take for its own.

    Args:
        context: TensorRT's.
        ports: what its engine takes and gives.
        device: where its tensors lie.
        track: the streams that its work goes to.

    Attributes:
        met: how many times it was told shapes that differ from those before.
    """

    def __init__(self, context: ExecutionContext, ports: IOTensors, device: torch.device, track: StreamOrder) -> None:
        self.context, self.ports, self.device, self.track = context, ports, device, track
        self.met = 0
        self._new_shapes = True
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._slots: weakref.ref[DeviceSlots] | None = None
        # An empty tensor has no address, and TensorRT takes none for an input that was forgotten.
        self._nothing = allocate((ALIGNMENT,), IOTensor(torch.uint8, ()), device)
        self._growing: dict[str, Any] = {}

    def point(self, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> None:
        """Tell the context where a call's inputs and slots lie, as far as it does not know.

        Raises:
            InputMismatch: a size that the plan was not built for.
            Unavailable: TensorRT refuses an address, or lacks an input.
        """
        if self._slots is None or self._slots() is not slots:
            self._slots = None
            self._tell(slots.items())
            self._slots = weakref.ref(slots)
        self._tell(inputs.items())
        if self._new_shapes or any(port.on_host for port in self.ports.inputs.values()):
            self._infer()
        self.met += self._new_shapes
        self._new_shapes = False

    def outputs(self) -> dict[str, Tensor | None]:
        """Memory for every output, told to the context; None for one that is allocated while it is computed."""
        return {name: self._output(name, port) for name, port in self.ports.outputs.items()}

    def queue(self, stream: int) -> None:
        """Queue the work on a stream, by its handle.

        Raises:
            Unavailable: TensorRT cannot.
        """
        with collect_errors() as said:
            if not self.context.execute_async_v3(stream):
                raise Unavailable(
                    f"TensorRT cannot run the plan: {said.why()}",
                    next_step="where the GPU's memory is full, free some of it or give smaller batches",
                )

    def run(self, inputs: Mapping[str, Tensor], slots: DeviceSlots) -> dict[str, Tensor]:
        """One call: the outputs by name, computed once the caller's stream has passed."""
        with self.track.turn(inputs.values(), slots) as stream:
            self.point(inputs, slots)
            found = self.outputs()
            self.queue(stream)
            given = {name: self._growing[name].taken() if made is None else made for name, made in found.items()}
        self.track.hand_over(given.values())
        if any(port.on_host for port in self.ports.outputs.values()):
            self.track.finish()
        return given

    def _tell(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            if name in self.ports.inputs:
                self._tell_shape(name, tuple(tensor.shape))
                self._tell_address(name, tensor.data_ptr())

    def _tell_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._shapes.get(name) == shape:
            return
        self._shapes.pop(name, None)
        self._new_shapes = True
        with collect_errors() as said:
            if not self.context.set_input_shape(name, shape):
                raise InputMismatch(
                    f"TensorRT does not take '{name}' of shape {shape}: {said.why()}",
                    next_step=f"the plan was built for shapes like {self.ports.inputs[name].shape}; compile with "
                    "dynamic_shapes= and example_inputs= that admit this one",
                )
        self._shapes[name] = shape

    def _tell_address(self, name: str, address: int) -> None:
        address = address or self._nothing.data_ptr()
        if self._addresses.get(name) == address:
            return
        self._addresses.pop(name, None)
        with collect_errors() as said:
            if not self.context.set_tensor_address(name, address):
                raise Unavailable(
                    f"TensorRT does not take the memory of '{name}': {said.why()}",
                    next_step="this is a bug of lorac's, not of your model",
                )
        self._addresses[name] = address

    def _infer(self) -> None:
        with collect_errors() as said:
            try:
                lacking = self.context.infer_shapes()
            except RuntimeError as error:
                raise InputMismatch(
                    f"TensorRT finds no sizes for the outputs: {said.why() if said.errors else error}",
                    next_step="give inputs whose sizes go together, as the model takes them",
                ) from error
            if lacking:
                raise InputMismatch(
                    f"the plan reads {', '.join(lacking)}, and the call gives no such input",
                    next_step="give every input that the program takes",
                )

    def _output(self, name: str, port: IOTensor) -> Tensor | None:
        shape = tuple(self.context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            self._growing[name] = output_allocator(port, self.device)
            self.context.set_output_allocator(name, self._growing[name])
            return None
        made = allocate(shape, port, self.device)
        self._tell_address(name, made.data_ptr())
        return made
