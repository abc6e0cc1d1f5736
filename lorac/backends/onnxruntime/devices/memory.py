"""The memory that sessions read and write: the host's or a GPU's.

A value in memory that a session can read is never copied. Tensors of a choice of adapters are copied to a GPU once, and
stay there while the choice may become active again. Inputs of a call are bound in place, and its outputs are returned
on their device.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import onnxruntime as ort
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.buffers import FusedBuffer, base_on_device, make_fused_buffers
from lorac.ir.slots.plans import SitePlan

FusedWeights = tuple[dict[str, FusedBuffer], dict[str, Tensor]]
"""A buffer per weight that is written in place, by site path, and the memory by slot name."""


def as_ort_value(tensor: Tensor) -> ort.OrtValue:
    """Return an OrtValue over a contiguous tensor's own memory, on any device."""
    if tensor.dtype == torch.bfloat16 or tensor.device.type != "cpu":  # NumPy does not support these
        return ort.OrtValue.from_dlpack(tensor.detach())
    value = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    assert not tensor.numel() or value.data_ptr() == tensor.data_ptr()
    return value


def as_tensor(value: ort.OrtValue) -> Tensor:
    """Return a tensor over an OrtValue's own memory, which it keeps alive."""
    if value.device_name() == "cpu" and value.data_type() != "tensor(bfloat16)":
        return torch.from_numpy(value.numpy())
    return torch.utils.dlpack.from_dlpack(value)


class Memory(ABC):
    """The memory of an engine's values, on one device."""

    copies: bool = False
    """Whether tensors of the CPU are copied there."""

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self._here = WeakTensorKeyDictionary()

    @abstractmethod
    def to_value(self, tensor: Tensor) -> ort.OrtValue:
        """Return a slot's tensor in this memory; all bindings of one tensor share the value."""

    def fused(self, plans: Mapping[str, SitePlan], base: BaseReader) -> FusedWeights:
        """Allocate weights that are written in place."""
        return make_fused_buffers(plans, base)

    def written(self, memory: Mapping[str, Tensor]) -> None:
        """Make written weights visible to sessions."""
        self.synchronize()

    def synchronize(self) -> None:  # noqa: B027  (only memory that torch writes asynchronously needs it)
        """Wait for torch's work in this memory, since sessions run on their own streams."""

    def output_device(self, inputs: Iterable[Tensor]) -> tuple[str, int]:
        """Return the type and index of the device for the outputs of a call: the device of its inputs."""
        index = next((tensor.device.index for tensor in inputs if tensor.device.type != "cpu"), None)
        return ("cpu", 0) if index is None else (self.place.type, index)


class HostMemory(Memory):
    """The memory of the host."""

    def to_value(self, tensor: Tensor) -> ort.OrtValue:
        if tensor.is_contiguous():
            return as_ort_value(tensor.detach())
        if tensor not in self._here:
            self._here[tensor] = tensor.detach().contiguous()
        return as_ort_value(self._here[tensor])


class _CopyingMemory(Memory):
    """Memory into which host tensors are copied, and copied again after torch wrote to them."""

    copies = True

    def to_value(self, tensor: Tensor) -> ort.OrtValue:
        written = 0 if tensor.is_inference() else tensor._version
        if tensor not in self._here:
            self._here[tensor] = self._copied(tensor.detach()), written
        value, known = self._here[tensor]
        if known != written:  # bindings reference the value, so it is updated in place
            value.update_inplace(as_ort_value(tensor.detach().contiguous()))
            self._here[tensor] = value, written
        return value

    @abstractmethod
    def _copied(self, tensor: Tensor) -> ort.OrtValue:
        """Return a copy of a tensor in this memory."""


class TorchDeviceMemory(_CopyingMemory):
    """A GPU's memory that torch can use: weights are written there, and tensors on the GPU are read in place."""

    def to_value(self, tensor: Tensor) -> ort.OrtValue:
        return super().to_value(tensor) if tensor.device.type == "cpu" else as_ort_value(tensor.detach().contiguous())

    def fused(self, plans: Mapping[str, SitePlan], base: BaseReader) -> FusedWeights:
        return make_fused_buffers(plans, base_on_device(base, self.place))

    def synchronize(self) -> None:
        torch.cuda.current_stream(self.place).synchronize()

    def _copied(self, tensor: Tensor) -> ort.OrtValue:
        # torch gives an empty tensor no address, and ONNX Runtime accepts no tensor without one.
        return as_ort_value(tensor.to(self.place).contiguous()) if tensor.numel() else empty_at(self.place, tensor)


class OrtDeviceMemory(_CopyingMemory):
    """A GPU's memory for ONNX Runtime only: torch was built without CUDA, so weights are merged on the host."""

    def written(self, memory: Mapping[str, Tensor]) -> None:
        for tensor in memory.values():
            self.to_value(tensor)

    def _copied(self, tensor: Tensor) -> ort.OrtValue:
        there = empty_at(self.place, tensor)
        if tensor.numel():
            there.update_inplace(as_ort_value(tensor.contiguous()))
        return there


def memory_at(place: torch.device) -> Memory:
    """Return the memory of a device."""
    if place.type == "cpu":
        return HostMemory(place)
    return TorchDeviceMemory(place) if torch.cuda.is_available() else OrtDeviceMemory(place)


def empty_at(place: torch.device, like: Tensor) -> ort.OrtValue:
    """Return an uninitialised OrtValue of a tensor's shape and dtype, in ONNX Runtime's memory."""
    kind = as_ort_value(torch.empty(1, dtype=like.dtype)).element_type()
    return ort.OrtValue.ortvalue_from_shape_and_type(list(like.shape), kind, place.type, place.index or 0)
