"""A network of one layer with a pair of slots, parsed and built by the real library, and a replacement for a GPU.

A plan runs on a GPU alone. ``Memory`` stands in for the one object that only a GPU makes, a context of an engine: it
has the methods that lorac calls, notes the calls, and computes from memory at the addresses that it was given. That it
has the real class' methods, with the real parameters, is a test of its own (``test_interfaces``).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from onnx import helper, numpy_helper

from lorac.backends.tensorrt.device.device_slots import DeviceSlots, allocate
from lorac.backends.tensorrt.device.execution_slot import ExecutionSlot
from lorac.backends.tensorrt.device.interfaces import IOTensor, IOTensors
from lorac.backends.tensorrt.library import find_library
from lorac.backends.tensorrt.refitting import mark_refittable, refit_flag

Tensor = torch.Tensor
IN, OUT, ROWS, RANK = 6, 4, 5, 3
WEIGHT, BIAS = "fc.weight", "fc.bias"
CPU = torch.device("cpu")
LIBRARY = find_library()


# --- the network ------------------------------------------------------------------------------------------------------
@functools.cache
def weights() -> dict[str, Tensor]:
    """Return W (in, out) and b (out) of the model."""
    drawn = torch.Generator().manual_seed(7)
    return {WEIGHT: torch.randn(IN, OUT, generator=drawn), BIAS: torch.randn(OUT, generator=drawn)}


@functools.cache
def model() -> onnx.ModelProto:
    """Return ``y = x·W + b + (x·a)·b`` as ONNX."""
    steps = (
        ("MatMul", "x", WEIGHT, "p"),
        ("Add", "p", BIAS, "q"),
        ("MatMul", "x", "a", "u"),
        ("MatMul", "u", "b", "v"),
    )
    nodes = [helper.make_node(op, [one, other], [out]) for op, one, other, out in (*steps, ("Add", "q", "v", "y"))]
    shapes: dict[str, list[str | int | None]] = {"x": ["n", IN], "a": [IN, "r"], "b": ["r", OUT], "y": ["n", OUT]}
    values = {
        name: helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()
    }
    constants = [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in weights().items()]
    graph = helper.make_graph(nodes, "tiny", [values[name] for name in "xab"], [values["y"]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def parsed() -> tuple[Any, Any]:
    """Return the network and the builder, which it needs."""
    trt = LIBRARY.module
    builder = trt.Builder(LIBRARY.logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, LIBRARY.logger)
    assert parser.parse(model().SerializeToString())
    return network, builder


@functools.cache
def plan() -> bytes:
    """Return the plan for two capabilities; the library for RTX builds it without a GPU."""
    return built(("SM86", "SM120"))


def built(capabilities: Sequence[str] = (), flags: Sequence[str] = (), refittable: Sequence[str] = ()) -> bytes:
    """Build the network.

    Args:
        capabilities: members of ``ComputeCapability``; none: the library's default.
        flags: members of ``BuilderFlag``.
        refittable: weights that can be replaced.
    """
    trt = LIBRARY.module
    network, builder = parsed()
    mark_refittable(network, refittable)
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, sizes in {"x": ((1, IN), (2, IN), (ROWS, IN)), "a": ((IN, 1), (IN, 2), (IN, RANK))}.items():
        profile.set_shape(name, *sizes)
    profile.set_shape("b", (1, OUT), (2, OUT), (RANK, OUT))
    config.add_optimization_profile(profile)
    config.clear_flag(trt.BuilderFlag.TF32)
    for name in flags:
        config.set_flag(trt.BuilderFlag.__members__[name])
    if refittable:
        config.set_flag(refit_flag(LIBRARY))
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
    for place, capability in enumerate(capabilities):
        config.set_compute_capability(trt.ComputeCapability.__members__[capability], place)
    return bytes(builder.build_serialized_network(network, config))


def io(*, sizes_depend_on_values: bool = False) -> IOTensors:
    """Return the inputs and outputs of an engine of the network."""
    kind = torch.float32
    inputs = {"x": IOTensor(kind, (-1, IN)), "a": IOTensor(kind, (IN, -1)), "b": IOTensor(kind, (-1, OUT))}
    return IOTensors(inputs, {"y": IOTensor(kind, (-1, -1 if sizes_depend_on_values else OUT))})


def computed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return the network's output."""
    return x @ weights()[WEIGHT] + weights()[BIAS] + (x @ a) @ b


def drawn(seed: int, rank: int = 2) -> dict[str, Tensor]:
    """Return slot tensors of an adapter."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": placed(torch.randn(IN, rank, generator=generator)),
        "b": placed(torch.randn(rank, OUT, generator=generator)),
    }


def placed(tensor: Tensor) -> Tensor:
    """Return a copy that TensorRT can read: CPU memory is aligned to 64 bytes, a GPU's to 512."""
    return allocate(tensor.shape, IOTensor(tensor.dtype, ()), CPU).copy_(tensor)


# --- in the place of a GPU --------------------------------------------------------------------------------------------
class Memory:
    """A context of the network that computes from the CPU's memory at the addresses that it was given.

    Attributes:
        calls: what was called, with the name of the tensor where there is one.
        refuses: name of a method -> whether it refuses a call with these arguments.
    """

    def __init__(self, io: IOTensors) -> None:
        self.io = io
        self.calls: list[tuple[object, ...]] = []
        self.refuses: dict[str, Callable[..., bool]] = {}
        self.capturable = True
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._allocators: dict[str, Any] = {}
        self._busy = threading.Lock()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self._noted("set_input_shape", name, shape):
            return False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if self._noted("set_tensor_address", name, memory):
            return False
        self._addresses[name] = memory
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert name == "y"
        columns = self.io.outputs["y"].shape[1]
        return (self._shapes["x"][0], columns)

    def infer_shapes(self) -> list[str]:
        self._noted("infer_shapes")
        return [name for name in self.io.inputs if name not in self._shapes]

    def set_output_allocator(self, name: str, output_allocator: object) -> bool:
        self._allocators[name] = output_allocator
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert self._busy.acquire(blocking=False), "two calls at a time in one context"
        try:
            if self._noted("execute_async_v3", stream_handle):
                return False
            y = computed(*(self._read(name) for name in "xab"))
            memory = self._allocated(y) if "y" in self._allocators else self._addresses["y"]
            ctypes.memmove(memory, y.data_ptr(), y.nbytes)
        finally:
            self._busy.release()
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable

    def _noted(self, method: str, *given: Any) -> bool:
        """Record a call; return whether it is accepted."""
        self.calls.append((method, *given[:1]))
        return method in self.refuses and self.refuses[method](*given)

    def _read(self, name: str) -> Tensor:
        shape, address = self._shapes[name], self._addresses[name]
        assert address and not address % 256, "TensorRT reads at multiples of 256 bytes"
        if not math.prod(shape):
            return torch.zeros(shape)
        raw = (ctypes.c_char * (math.prod(shape) * 4)).from_address(address)
        return torch.frombuffer(raw, dtype=torch.float32).reshape(shape).clone()

    def _allocated(self, y: Tensor) -> int:
        memory = self._allocators["y"].reallocate_output_async("y", 0, y.nbytes, 256, 0)
        self._allocators["y"].notify_shape("y", tuple(y.shape))
        return int(memory)


class Still:
    """Replaces streams: work is done when it is queued. Counts waits and retained outputs."""

    def __init__(self) -> None:
        self.finished = 0
        self.handed: list[Tensor] = []

    @contextlib.contextmanager
    def acquire(self, inputs: Iterable[Tensor], slots: DeviceSlots) -> Iterator[int]:
        yield 7

    def retain_outputs(self, outputs: Iterable[Tensor]) -> None:
        self.handed = list(outputs)

    def finish(self) -> None:
        self.finished += 1


class Lanes:
    """Makes contexts, and records them."""

    def __init__(self, io: IOTensors, refuses: Mapping[str, Callable[..., bool]] | None = None) -> None:
        self.io, self.refuses = io, dict(refuses or {})
        self.made: list[Memory] = []
        self.executions: list[ExecutionSlot] = []
        self.capturable = True

    def __call__(self) -> ExecutionSlot:
        context = Memory(self.io)
        context.refuses, context.capturable = self.refuses, self.capturable
        self.made.append(context)
        self.executions.append(ExecutionSlot(context, self.io, CPU, Still(), LIBRARY))
        return self.executions[-1]
