"""The OpenVINO engine: a compiled model per graph; a choice of adapters is a set of tensors set on infer requests."""

import functools
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import openvino as ov
import torch
from torch import Tensor

from lorac.backends.onnx.caching_engine import CachingEngine, CachingProgram
from lorac.backends.onnx.kv_cache import BufferedCache, CacheLayout
from lorac.backends.onnx.model_files import MAX_LENGTH_KEY
from lorac.backends.openvino.compiled_model import OV_TYPES
from lorac.backends.openvino.options import OpenVINOOptions
from lorac.errors import InputMismatch
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.attention_ops import NEW_LENGTHS, PAST_LENGTHS, is_past_input, present_name
from lorac.ir.graph.feeds import CacheInputShape
from lorac.ir.graph.graph import SlotInput
from lorac.ir.slots.composition import ComposedWeights
from lorac.target.placed_engine import LoadedProgram

_TORCH_DTYPES = {kind.get_type_name(): dtype for dtype, kind in OV_TYPES.items()}
_WAITING = 2
"""Requests per stream: while one is computed, another call may copy its inputs and outputs."""
_INT32 = torch.iinfo(torch.int32)


class CompiledGraph:
    """One graph of the program: its compiled model and its interface.

    Args:
        metadata: the metadata of the model's file.
        interface: its inputs and outputs.
        slots: its slot inputs, by public name.
        options: the target's options.

    Attributes:
        outputs: the names of its outputs.
        cache: the layout of its cache; None if it has no cache.
        places: the index of every input.
        dtypes: the dtype of every input.
        turns: a semaphore that limits the number of calls with a request.
    """

    def __init__(
        self,
        model: ov.CompiledModel,
        metadata: Mapping[str, str],
        interface: Interface,
        slots: Mapping[str, SlotInput],
        options: OpenVINOOptions,
    ) -> None:
        self.model, self.interface, self.slots = model, interface, slots
        names = [port.node.friendly_name for port in model.inputs]
        self.places = {name: index for index, name in enumerate(names)}
        self.dtypes = {
            name: _TORCH_DTYPES.get(port.element_type.get_type_name())
            for name, port in zip(names, model.inputs, strict=True)
        }
        self.outputs = interface.outputs
        inputs, outputs = _shapes_of(names, model.inputs), _shapes_of(self.outputs, model.outputs)
        if any(map(is_past_input, names)):  # OpenVINO drops the lengths, which no op of a model of states alone reads
            inputs.setdefault(PAST_LENGTHS, ((None,), torch.int64))
        self.cache = CacheLayout.of(inputs, outputs, metadata.get(MAX_LENGTH_KEY), read_whole=True)
        self.turns = threading.BoundedSemaphore(_WAITING * options.streams)


class IdleRequests(defaultdict[str, list[ov.InferRequest]]):
    """Requests of each graph that hold a choice's tensors and are not in use."""

    def __init__(self) -> None:
        super().__init__(list)


class OvEngine(CachingEngine[CompiledGraph, OpenVINOOptions]):
    """An engine of one compiled model per graph."""

    target = "openvino"

    def __init__(self, program: LoadedProgram[CompiledGraph, OpenVINOOptions]) -> None:
        super().__init__(program)
        self._dtypes = {name: g.dtypes[name] for g in self.graphs.values() for name in g.slots if name in g.dtypes}
        self._written_requests = IdleRequests()
        self._written = self._to_slots(self.memory)

    def _to_slots(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Convert tensors to the dtypes of their slots; one that already has the dtype is not copied."""
        return {name: tensor.detach().to(self._dtypes[name]).contiguous() for name, tensor in tensors.items()}

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> "OvProgram":
        return OvProgram(self, self._to_slots(tensors))

    @property
    def written_program(self) -> "OvProgram":
        return OvProgram(self, self._written, self._written_requests)

    def record_written(self, snapshot: ComposedWeights) -> None:
        """Copy the weights to the requests' memory in their precision, if it is another one."""
        for name, tensor in self.memory.items():
            if self._written[name] is not tensor:
                self._written[name].copy_(tensor)

    def machine_notes(self, graph: CompiledGraph) -> tuple[str, ...]:
        """Describe the device and the precision of products."""
        device = graph.model.get_property("EXECUTION_DEVICES")
        return (f"OpenVINO computes on {', '.join(device)} in {self.options.precision}",)


@dataclass(frozen=True, eq=False)
class OvProgram(CachingProgram):
    """The program with tensors for its slot inputs.

    Attributes:
        requests: the requests that hold the tensors.
    """

    engine: OvEngine
    requests: IdleRequests = field(default_factory=IdleRequests)

    @functools.cached_property
    def values(self) -> Mapping[str, ov.Tensor]:
        """Slot input -> the tensor as an OpenVINO tensor over the same memory."""
        return {name: as_ov_tensor(tensor) for name, tensor in self.tensors.items()}

    def run_graph(self, graph: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        loaded, idle = self.engine.graphs[graph], self.requests[graph]
        with loaded.turns:
            request = idle.pop() if idle else self._new_request(loaded)
            _set_inputs(loaded, request, inputs)
            request.infer()
            outputs = [as_torch_copy(request.get_output_tensor(index)) for index in range(len(loaded.model.outputs))]
            idle.append(request)
        return outputs

    def run_step(
        self, graph: str, cache: BufferedCache[Any], inputs: Mapping[str, Tensor], output: str, logits: Tensor
    ) -> None:
        loaded = self.engine.graphs[graph]

        def bind(request: ov.InferRequest, *tensors: Mapping[str, Tensor]) -> None:
            for each in tensors:
                _set_inputs(loaded, request, each)

        with loaded.turns:
            request = cache.binding(loaded, self.requests, lambda: self._new_request(loaded), bind)
            _set_inputs(loaded, request, inputs)
            rows, length = inputs[cache.layout.token_input].shape
            presents = dict[str, Tensor]()  # the keys and values of the new tokens, or the state after them
            for past in cache.buffers:
                sizes, dtype = cache.layout.shapes[past]
                known = (length if size is None else size for size in sizes[1:])
                presents[past] = torch.empty(rows, *known, dtype=dtype)
            outputs = {output: logits, **{present_name(past): tensor for past, tensor in presents.items()}}
            for name, tensor in outputs.items():
                request.set_output_tensor(loaded.outputs.index(name), as_ov_tensor(tensor))
            request.infer()
        begins, counts = inputs[PAST_LENGTHS], inputs[NEW_LENGTHS]
        of_rows, tokens = (torch.arange(length) < counts[:, None]).nonzero(as_tuple=True)
        places, begin = begins[of_rows] + tokens, int(begins[0])
        together = len(of_rows) == rows * length and bool((begins == begin).all())
        for past, new in presents.items():
            buffer = cache.buffers[past]
            if past in cache.layout.states:
                buffer.copy_(new)
            elif together:
                buffer[:, :, begin : begin + length] = new
            else:
                buffer[of_rows, :, places] = new[of_rows, :, tokens]

    def _new_request(self, loaded: CompiledGraph) -> ov.InferRequest:
        request = loaded.model.create_infer_request()
        for name in loaded.slots.keys() & self.values.keys() & loaded.places.keys():
            request.set_input_tensor(loaded.places[name], self.values[name])
        return request


def _shapes_of(names: Iterable[str], ports: Iterable[Any]) -> dict[str, CacheInputShape]:
    """Return the sizes of inputs or outputs, with None for dynamic ones, and their dtypes."""
    return {
        name: (
            tuple(size.get_length() if size.is_static else None for size in port.partial_shape),
            _TORCH_DTYPES[port.element_type.get_type_name()],
        )
        for name, port in zip(names, ports, strict=True)
    }


def _set_inputs(loaded: CompiledGraph, request: ov.InferRequest, inputs: Mapping[str, Tensor]) -> None:
    for name in inputs.keys() & loaded.places.keys():  # OpenVINO drops inputs that no op reads
        tensor = inputs[name]
        if tensor.dtype == torch.int64 and tensor.numel():
            least, most = torch.aminmax(tensor)
            if least < _INT32.min or most > _INT32.max:
                raise InputMismatch(
                    f"input '{name}' has numbers beyond {_INT32.max}, and OpenVINO computes whole numbers in 32 bits",
                    next_step="give smaller numbers; target='onnxruntime' and target='eager' take these",
                )
        request.set_input_tensor(loaded.places[name], as_ov_tensor(tensor))


def as_ov_tensor(tensor: Tensor) -> ov.Tensor:
    """Return an OpenVINO tensor over the memory of a contiguous tensor."""
    kind, shape = OV_TYPES[tensor.dtype], ov.Shape(list(tensor.shape))
    if not tensor.numel():
        return ov.Tensor(kind, shape)
    array = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return ov.Tensor(array, shape, kind)


def as_torch_copy(value: ov.Tensor) -> Tensor:
    """Return a torch copy of an OpenVINO tensor."""
    dtype = _TORCH_DTYPES[value.element_type.get_type_name()]
    assert dtype != torch.bfloat16, "models are float32"
    return torch.from_numpy(np.array(value.data))
