"""The memory that sessions read and write: the machine's own, or a GPU's.

A value that already lies where its session reads it is handed over as it lies there, never copied. What a choice of
adapters binds is brought to a GPU once, and stays there for as long as the choice may be active again; what a call
brings is bound as it came, and answered where it came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

import onnxruntime as ort
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from lorac.ir.sites import BaseReader
from lorac.ir.slots.buffers import FusedBuffer, base_on_device, make_fused_buffers
from lorac.ir.slots.plans import SitePlan

Tensor = torch.Tensor
FusedWeights = tuple[dict[str, FusedBuffer], dict[str, Tensor]]
"""A buffer per weight that is written in place, by site path, and the memory by slot name."""


def as_ort_value(tensor: Tensor) -> ort.OrtValue:
    """An OrtValue over a contiguous tensor's own memory, wherever that is."""
    if tensor.dtype == torch.bfloat16 or tensor.device.type != "cpu":  # for which NumPy has nothing
        return ort.OrtValue.from_dlpack(tensor.detach())
    value = ort.OrtValue.ortvalue_from_numpy(tensor.numpy())
    assert not tensor.numel() or value.data_ptr() == tensor.data_ptr()
    return value


def as_tensor(value: ort.OrtValue) -> Tensor:
    """A tensor over an OrtValue's own memory, which it keeps."""
    if value.device_name() == "cpu" and value.data_type() != "tensor(bfloat16)":
        return torch.from_numpy(value.numpy())
    return torch.utils.dlpack.from_dlpack(value)


class Memory(ABC):
    """Where an engine's values lie.

    Args:
        place: the device.
    """

    def __init__(self, place: torch.device) -> None:
        self.place = place
        self._here = WeakTensorKeyDictionary()

    @abstractmethod
    def held(self, tensor: Tensor) -> ort.OrtValue:
        """What a slot's tensor comes to in this memory; bindings that hold one tensor share it."""

    @abstractmethod
    def fused(self, plans: Mapping[str, SitePlan], base: BaseReader) -> FusedWeights:
        """Memory for weights that are written in place."""

    def written(self, memory: Mapping[str, Tensor]) -> None:
        """Have sessions read what was written into the memory of weights."""
        self.settled()

    def settled(self) -> None:  # noqa: B027  (only a GPU that torch writes to is to be waited for)
        """Wait for what torch was asked to do in this memory: sessions run in an order of their own."""

    def answers(self, given: Iterable[Tensor]) -> tuple[str, int]:
        """The kind and the number of the device that a call is to be answered on: where its inputs are."""
        index = next((tensor.device.index for tensor in given if tensor.device.type != "cpu"), None)
        return ("cpu", 0) if index is None else (self.place.type, index)


class HostMemory(Memory):
    """The machine's own."""

    def held(self, tensor: Tensor) -> ort.OrtValue:
        if tensor.is_contiguous():
            return as_ort_value(tensor.detach())
        if tensor not in self._here:
            self._here[tensor] = tensor.detach().contiguous()
        return as_ort_value(self._here[tensor])

    def fused(self, plans: Mapping[str, SitePlan], base: BaseReader) -> FusedWeights:
        return make_fused_buffers(plans, base)


class _CopyingMemory(Memory):
    """Memory that tensors of the CPU are copied into: again where torch counts them as written since."""

    def held(self, tensor: Tensor) -> ort.OrtValue:
        written = 0 if tensor.is_inference() else tensor._version
        if tensor not in self._here:
            self._here[tensor] = self._copied(tensor.detach()), written
        value, known = self._here[tensor]
        if known != written:  # bindings hold the value, so it stays the same one
            value.update_inplace(as_ort_value(tensor.detach().contiguous()))
            self._here[tensor] = value, written
        return value

    @abstractmethod
    def _copied(self, tensor: Tensor) -> ort.OrtValue:
        """A copy of a tensor here."""


class TorchDeviceMemory(_CopyingMemory):
    """A GPU's, as torch has it: weights are written there, and what is given there is read where it lies."""

    def held(self, tensor: Tensor) -> ort.OrtValue:
        return super().held(tensor) if tensor.device.type == "cpu" else as_ort_value(tensor.detach().contiguous())

    def fused(self, plans: Mapping[str, SitePlan], base: BaseReader) -> FusedWeights:
        return make_fused_buffers(plans, base_on_device(base, self.place))

    def settled(self) -> None:
        torch.cuda.current_stream(self.place).synchronize()

    def _copied(self, tensor: Tensor) -> ort.OrtValue:
        # torch has no address for what is empty, and ONNX Runtime takes none without one.
        return as_ort_value(tensor.to(self.place).contiguous()) if tensor.numel() else empty_at(self.place, tensor)


class OrtDeviceMemory(_CopyingMemory):
    """A GPU's, as ONNX Runtime alone has it: this torch was built without CUDA, and weights are merged on the CPU."""

    def fused(self, plans: Mapping[str, SitePlan], base: BaseReader) -> FusedWeights:
        return make_fused_buffers(plans, base)

    def written(self, memory: Mapping[str, Tensor]) -> None:
        for tensor in memory.values():
            self.held(tensor)

    def _copied(self, tensor: Tensor) -> ort.OrtValue:
        there = empty_at(self.place, tensor)
        if tensor.numel():
            there.update_inplace(as_ort_value(tensor.contiguous()))
        return there


def memory_at(place: torch.device) -> Memory:
    """The memory of a device."""
    if place.type == "cpu":
        return HostMemory(place)
    return TorchDeviceMemory(place) if torch.cuda.is_available() else OrtDeviceMemory(place)


def empty_at(place: torch.device, like: Tensor) -> ort.OrtValue:
    """An OrtValue of a tensor's shape and dtype on a device, in memory of ONNX Runtime's, of no content yet."""
    kind = as_ort_value(torch.empty(1, dtype=like.dtype)).element_type()
    return ort.OrtValue.ortvalue_from_shape_and_type(list(like.shape), kind, place.type, place.index or 0)
