"""An engine whose properties come from a parsed network, and a refitter that records its calls: no GPU, no engine."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import torch

from lorac.backends.tensorrt import library
from lorac.backends.tensorrt.device.execution_slot import allocator_class
from lorac.backends.tensorrt.device.interfaces import IOTensor
from tests.backends.tensorrt.tiny import CPU, LIBRARY, parsed

Tensor = torch.Tensor


def allocator() -> Any:
    """Return the allocator of an output of two columns in float16."""
    return allocator_class(LIBRARY)(IOTensor(torch.float16, (-1, 2)), CPU)


class OfNetwork:
    """The inputs and outputs of an engine, read from the network of ``tiny`` before it is built."""

    num_io_tensors = 4
    refittable = True
    streamable_weights_size = 0
    weight_streaming_budget_v2 = 0
    device_memory_size_v2 = 0

    def __init__(self) -> None:
        self.network, self.builder = parsed()
        inputs = [self.network.get_input(i) for i in range(self.network.num_inputs)]
        outputs = [self.network.get_output(i) for i in range(self.network.num_outputs)]
        self._found: dict[str, Any] = {tensor.name: tensor for tensor in (*inputs, *outputs)}
        assert len(self._found) == self.num_io_tensors

    def get_tensor_name(self, index: int) -> str:
        return list(self._found)[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = LIBRARY.module.TensorIOMode
        return modes.INPUT if self._found[name].is_network_input else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self._found[name].dtype

    def get_tensor_shape(self, name: str) -> Any:
        return self._found[name].shape

    def get_tensor_location(self, name: str) -> Any:
        places = LIBRARY.module.TensorLocation
        return places.HOST if self._found[name].is_shape_tensor else places.DEVICE

    def get_weight_streaming_automatic_budget(self) -> int:
        return 0


class Weights:
    """A refitter that records the weights of an engine and their partners.

    Args:
        built: what the engine was built with.
        joined: weight -> another that has to be written with it.
    """

    weights_validation = True

    def __init__(self, built: dict[str, Tensor], joined: dict[str, str] | None = None) -> None:
        self.holds = {name: tensor.clone() for name, tensor in built.items()}
        self.joined = joined or {}
        self.fails = False
        self.set: dict[str, Tensor] = {}
        self.runs: list[list[str]] = []

    def set_named_weights(self, name: str, weights: Any, location: Any) -> bool:
        assert location == LIBRARY.module.TensorLocation.HOST, "the CPU's memory is named as what it is"
        kind, count = library.torch_dtype(weights.dtype), weights.size
        shape = self.holds[name].shape
        raw = (ctypes.c_char * weights.nbytes).from_address(weights.numpy().ctypes.data)
        self.set[name] = torch.frombuffer(raw, dtype=kind, count=count).view(shape)
        return True

    def unset_named_weights(self, weights_name: str) -> bool:
        del self.set[weights_name]
        return True

    def get_missing_weights(self) -> list[str]:
        return [self.joined[name] for name in self.set if name in self.joined and self.joined[name] not in self.set]

    def get_weights_prototype(self, weights_name: str) -> Any:
        weight = self.holds[weights_name]
        return SimpleNamespace(dtype=LIBRARY.dtype(weight.dtype), size=weight.numel())

    def refit_cuda_engine(self) -> bool:
        assert not self.get_missing_weights()
        self.runs.append(sorted(self.set))
        for name, tensor in self.set.items():
            self.holds[name].copy_(tensor)
            if self.fails:
                return False
        return True
