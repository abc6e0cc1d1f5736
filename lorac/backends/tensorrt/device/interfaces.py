"""The parts of TensorRT's interface that run a plan, as types: TensorRT 10 and 11 and TensorRT for RTX share them.

Where one has what the other lacks, the method says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class ExecutionContext(Protocol):
    """``IExecutionContext``: one execution at a time, whose inputs it was told by address and shape."""

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """Say an input's shape; False where no profile admits it."""

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """Say where an input or output lies, aligned to 256 bytes; False where that is refused."""

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        """The shape of an input or output, -1 where it depends on values."""

    def infer_shapes(self) -> list[str]:
        """Compute the outputs' shapes; returns the inputs that were not told enough of."""

    def set_output_allocator(self, name: str, output_allocator: object) -> bool:
        """Have an output's memory asked for while it is computed."""

    def execute_async_v3(self, stream_handle: int) -> bool:
        """Queue the work on a stream; False where that failed."""

    def is_stream_capturable(self, stream: int) -> bool:
        """Whether a CUDA graph can be made of its work; TensorRT for RTX alone."""


class CudaEngine(Protocol):
    """``ICudaEngine``: a plan on a device."""

    num_io_tensors: int
    refittable: bool
    streamable_weights_size: int
    weight_streaming_budget_v2: int

    def get_tensor_name(self, index: int) -> str:
        """The name of an input or output."""

    def get_tensor_mode(self, name: str) -> Any:
        """Whether it is an input, an output or neither."""

    def get_tensor_dtype(self, name: str) -> Any:
        """Its dtype, as TensorRT names it."""

    def get_tensor_shape(self, name: str) -> Sequence[int]:
        """Its shape, -1 where it varies."""

    def get_tensor_location(self, name: str) -> Any:
        """Whether it lies in the device's or in the host's memory."""

    def get_weight_streaming_automatic_budget(self) -> int:
        """How many bytes of weights TensorRT would keep on the device, in view of what is free."""


class Refitter(Protocol):
    """``Refitter``: replaces weights of an engine."""

    weights_validation: bool

    def set_named_weights(self, name: str, weights: Any, location: Any) -> bool:
        """Say what a weight is to be; False where dtype or size are not the built one's."""

    def unset_named_weights(self, weights_name: str) -> bool:
        """Forget what a weight was to be: what is set stays set, and would be written again by every refit."""

    def get_missing_weights(self) -> list[str]:
        """The weights that the engine combined with those set, and that have to be set with them."""

    def get_weights_prototype(self, weights_name: str) -> Any:
        """The dtype and size that a weight was built with."""

    def refit_cuda_engine(self) -> bool:
        """Write what was set; False where that failed, perhaps half-way."""
