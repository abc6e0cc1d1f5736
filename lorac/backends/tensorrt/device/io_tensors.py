"""Names, dtypes and sizes of an engine's inputs and outputs."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lorac.backends.tensorrt.device.interfaces import CudaEngine
from lorac.backends.tensorrt.library import torch_dtype


@dataclass(frozen=True)
class IOTensor:
    """An input or output.

    Attributes:
        shape: its sizes, -1 where they vary.
        on_host: whether it lies in the host's memory, as values do that shapes are computed from.
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
    def of(cls, engine: CudaEngine) -> "IOTensors":
        """Return those of an engine."""
        inputs, outputs = dict[str, IOTensor](), dict[str, IOTensor]()
        for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
            on_host = engine.get_tensor_location(name).name == "HOST"
            io_tensor = IOTensor(
                torch_dtype(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)), on_host
            )
            side = inputs if engine.get_tensor_mode(name).name == "INPUT" else outputs
            side[name] = io_tensor
        return cls(inputs, outputs)
