"""Types for the part of TensorRT's interface that runs plans, and the inputs and outputs of engines.

TensorRT 10, 11 and TensorRT for RTX share the interface; methods that only one of them has are marked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from lorac.backends.tensorrt.library import torch_dtype

if TYPE_CHECKING:
    import tensorrt


class ExecutionContext(Protocol):
    """``IExecutionContext``: one execution at a time, with inputs set by address and shape."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Set an input's shape; return False if no profile allows it."""

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Set the address of an input or output, aligned to 256 bytes; return False if TensorRT refuses it."""

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        """Return the shape of an input or output, with -1 for sizes that depend on values."""

    def infer_shapes(self) -> list[str]:
        """Compute the outputs' shapes; return the inputs that are not fully set."""

    def set_output_allocator(self, name: str, output_allocator: object) -> bool:
        """Set the allocator of an output, which is called while the output is computed."""

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue the work on a stream; return False if that failed."""

    def is_stream_capturable(self, stream: int) -> bool:
        """Return whether the work can be captured into a CUDA graph; TensorRT for RTX only."""


class CudaEngine(Protocol):
    """``ICudaEngine``: a plan on a device."""

    num_io_tensors: int
    refittable: bool
    streamable_weights_size: int
    weight_streaming_budget_v2: int
    device_memory_size_v2: int

    def get_tensor_name(self, index: int) -> str:
        """Return the name of an input or output."""

    def get_tensor_mode(self, name: str) -> tensorrt.TensorIOMode:
        """Return whether a tensor is an input, an output or neither."""

    def get_tensor_dtype(self, name: str) -> tensorrt.DataType:
        """Return a tensor's dtype in TensorRT's terms."""

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        """Return a tensor's shape, with -1 for dynamic sizes."""

    def get_tensor_location(self, name: str) -> tensorrt.TensorLocation:
        """Return whether a tensor is in the device's or the host's memory."""

    def get_weight_streaming_automatic_budget(self) -> int:
        """Return the number of bytes of weights that TensorRT would keep on the device, given its free memory."""


class Refitter(Protocol):
    """``Refitter``: replaces weights of an engine."""

    weights_validation: bool

    def set_named_weights(self, name: str, weights: tensorrt.Weights, location: tensorrt.TensorLocation) -> bool:
        """Set a weight; return False if its dtype or size differs from the built one."""

    def unset_named_weights(self, weights_name: str) -> bool:
        """Unset a weight; otherwise every refit would write it again."""

    def get_missing_weights(self) -> list[str]:
        """Return further weights that must be set, since the engine combined them with weights that are set."""

    def get_weights_prototype(self, weights_name: str) -> tensorrt.Weights:
        """Return the dtype and size with which a weight was built."""

    def refit_cuda_engine(self) -> bool:
        """Write the weights that are set; return False on failure, which may leave some written."""


@dataclass(frozen=True)
class IOTensor:
    """An input or output of an engine.

    Attributes:
        shape: its sizes, with -1 for dynamic ones.
        on_host: whether it is in the host's memory, as are values from which shapes are computed.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    on_host: bool = False


@dataclass(frozen=True)
class IOTensors:
    """The inputs and outputs of an engine, by name."""

    inputs: Mapping[str, IOTensor]
    outputs: Mapping[str, IOTensor]

    @classmethod
    def of(cls, engine: CudaEngine) -> IOTensors:
        """Return the inputs and outputs of an engine."""
        inputs, outputs = dict[str, IOTensor](), dict[str, IOTensor]()
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            on_host = engine.get_tensor_location(name).name == "HOST"
            dtype, shape = torch_dtype(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name))
            side = inputs if engine.get_tensor_mode(name).name == "INPUT" else outputs
            side[name] = IOTensor(dtype, shape, on_host)
        return cls(inputs, outputs)
