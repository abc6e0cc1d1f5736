"""The self-test without a GPU: ONNX Runtime runs the file for the parser on the CPU (invariant 8).

Its result holds for the plan as far as the library follows ONNX. Both the file and the program from which it was
emitted compute half precision in float32: the test looks for lost slots, not for the library's rounding, and so
rounding cannot change a router's choice. Outputs are cast back to half precision, since a file contains rounded
constants, such as an attention's scale, and torch does not.
"""

import copy
import dataclasses
import functools
import operator
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import onnx
import onnxruntime as ort
import torch
from google.protobuf.message import Message
from torch import Tensor, fx

from lorac.backends.onnx.base_backend import OnnxBackend
from lorac.backends.onnx.emitted_program import EmittedProgram
from lorac.backends.onnx.engine import OnnxEngine, SlotInputProgram
from lorac.backends.onnx.model_files import (
    MODEL_FILE,
    Array,
    SlotStorage,
    graph_file,
    read_model_files,
    walk_nodes,
    walk_subgraphs,
    walk_tensors,
)
from lorac.backends.onnx.self_test import run_self_test
from lorac.backends.tensorrt.engine import GraphPlan
from lorac.backends.tensorrt.options import TensorRTOptions
from lorac.ir.graph.graph import Graph, Program
from lorac.ir.slots.composition import ComposedWeights
from lorac.target.engine import ProgramFiles
from lorac.target.placed_engine import LoadedProgram

T = TypeVar("T")
_HALF = (torch.float16, torch.bfloat16)
_HALF_TYPES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_DTYPE_ATTRIBUTES = ("to", "dtype")
"""Attributes of ops that name the dtype of their output."""


def check_on_cpu(backend: OnnxBackend[TensorRTOptions, GraphPlan], emitted: EmittedProgram[TensorRTOptions]) -> None:
    """Compare emitted files, run on the CPU, with the program from which they were emitted.

    Raises:
        CompileError: naming the lost slots.
    """
    request, program, files = emitted.request, emitted.program, emitted.open_files()
    constant = backend.slot_storage(request) is SlotStorage.CONSTANTS
    cpu_engine = CpuEngine(
        LoadedProgram(
            graphs={name: CpuGraph(program, name, files) for name in program.graphs},
            plans=request.plans,
            base=backend.base_reader(files) or request.base,
            mode="baked" if constant else request.mode,
            files=files,
            options=request.options,
        )
    )
    snapshot = ComposedWeights(()) if constant and request.mode != "baked" else request.snapshot
    graphs = {name: widen_graph(graph) for name, graph in program.graphs.items()}
    run_self_test(cpu_engine, Program(graphs), snapshot)


class CpuGraph:
    """The emitted file of a graph, which ONNX Runtime runs; the first run loads it.

    Args:
        program: the lowered program.
        name: the name of the graph.
        files: the open files of the program.
    """

    def __init__(self, program: Program, name: str, files: ProgramFiles) -> None:
        graph = program.graphs[name]
        self.interface, self.slots = graph.interface, graph.slots
        self.dtypes: Mapping[str, torch.dtype | None] = dict.fromkeys(self.interface.inputs)
        self._output_dtypes = _output_dtypes(graph)
        self._files, self._name = files, name

    @functools.cached_property
    def session(self) -> ort.InferenceSession:
        """The session over the file."""
        return _create_session(self._files, self._name)

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the graph on inputs and slot tensors, given by name."""
        wide = {name: tensor.float() if tensor.dtype in _HALF else tensor for name, tensor in inputs.items()}
        arrays = {name: tensor.detach().numpy() for name, tensor in wide.items()}
        outputs = [torch.from_numpy(value) for value in self.session.run(None, arrays)]
        dtypes = self._output_dtypes[-len(outputs) :]
        return [value.to(dtype) if dtype in _HALF else value for value, dtype in zip(outputs, dtypes, strict=True)]


class CpuEngine(OnnxEngine[CpuGraph, TensorRTOptions]):
    """An engine that runs the emitted files of a program with ONNX Runtime on the CPU."""

    target = "tensorrt"

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> SlotInputProgram:
        return SlotInputProgram(self, tensors)


def _create_session(files: ProgramFiles, graph: str) -> ort.InferenceSession:
    """Create a session over a model that computes half precision in float32."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    model, weights = read_model_files(files, graph)
    if not _widen_model(model):
        path = str(files[graph_file(graph, MODEL_FILE)].where)
        return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    arrays = {name: _widen_array(array) for name, array in weights.items()}
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in arrays.values()]
    settings.add_external_initializers(list(arrays), values)
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    session.lorac_constants = arrays  # the session reads them as long as it exists
    return session


def _widen_model(model: onnx.ModelProto) -> bool:
    """Make a model compute half precision in float32; return whether it changed."""
    graphs = (model.graph, *walk_subgraphs(model.graph))
    values = (value for graph in graphs for value in (*graph.input, *graph.output, *graph.value_info))
    attributes = (attribute for node in walk_nodes(model.graph) for attribute in node.attribute)
    changed = []
    for tensor in walk_tensors(model):
        half = tensor.data_type in _HALF_TYPES
        if half and tensor.data_location != onnx.TensorProto.EXTERNAL:  # the values of others are passed in memory
            wide = _widen_array(onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(onnx.numpy_helper.from_array(wide, tensor.name))
        changed.append(half)
        _widen_field(tensor, "data_type")
    changed += [_widen_field(value.type.tensor_type, "elem_type") for value in values]
    changed += [_widen_field(attribute, "i") for attribute in attributes if attribute.name in _DTYPE_ATTRIBUTES]
    return any(changed)


def _widen_field(message: Message, field: str) -> bool:
    if getattr(message, field) not in _HALF_TYPES:
        return False
    setattr(message, field, onnx.TensorProto.FLOAT)
    return True


def _widen_array(array: Array) -> Array:
    half = array.dtype.itemsize == 2 and array.dtype.kind not in "iu"
    return np.ascontiguousarray(array.astype(np.float32) if half else array)


def widen_graph(graph: Graph) -> Graph:
    """Return a copy of a graph that computes half precision in float32; the same graph if it has none."""
    module = graph.exported.graph_module
    if not any(_is_half(node.meta.get("val")) for node in module.graph.nodes):
        return graph
    whole = copy.deepcopy(module.graph)
    given = [node for node in whole.nodes if node.op == "placeholder"]

    def widen(value: T) -> T | torch.dtype:
        return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value

    for node, original in zip(whole.nodes, module.graph.nodes, strict=True):
        node.name = original.name
        if node.op == "call_function":
            node.args, node.kwargs = (fx.node.map_aggregate(given, widen) for given in (node.args, node.kwargs))
    with whole.inserting_after(given[-1]):
        for node in [node for node in given if _is_half(node.meta.get("val"))]:
            cast = whole.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.float32})
            node.replace_all_uses_with(cast, delete_user_cb=functools.partial(operator.is_not, cast))
    last = whole.output_node()

    def restore(node: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not _is_half(value):
            return node
        with whole.inserting_before(last):
            return whole.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": value.dtype})

    last.args = fx.node.map_arg(last.args, restore)
    exported = copy.copy(graph.exported)
    exported._graph_module = fx.GraphModule(module, whole)
    return dataclasses.replace(graph, exported=exported)


def _output_dtypes(graph: Graph) -> list[torch.dtype | None]:
    """Return the dtypes of a graph's outputs; the model's own outputs are last."""
    (outputs,) = graph.fx.output_node().args
    assert isinstance(outputs, list | tuple)
    values = (node.meta.get("val") if isinstance(node, fx.Node) else None for node in outputs)
    return [value.dtype if isinstance(value, Tensor) else None for value in values]


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in _HALF
