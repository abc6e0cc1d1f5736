"""The self-test without a GPU: the very file that the parser is handed, run by ONNX Runtime on the CPU (invariant 8).

What it says of a file holds for the plan as far as the library computes what ONNX says. Half precision is computed in
float32, in the file and in the program that it was emitted from alike: how the library rounds is not tested by it,
that no slot is lost is, and rounding decides no router's choice. Answers come in half precision again, for a file holds
its numbers rounded, a scale of attention for instance, where torch has them whole.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import fx

from lorac.backends.onnx.model_files import MODEL_FILE, Array, graph_file, read_model_files, walk_subgraphs
from lorac.backends.onnx.self_test import run_self_test
from lorac.ir.graph.feeds import select_reached_plans
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.program import Program
from lorac.ir.sites import BaseReader
from lorac.ir.slots.buffers import make_fused_buffers
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.plans import SitePlan
from lorac.target.engine import ProgramFiles

Tensor = torch.Tensor
_HALF = (torch.float16, torch.bfloat16)
_HALF_TYPES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
_DTYPE_ATTRIBUTES = ("to", "dtype")
"""Attributes of ops that say what they answer in."""


def check_on_cpu(tried: CpuProgram, program: Program, snapshot: ComposedWeights) -> None:
    """Hold emitted files against the program that they were emitted from.

    Args:
        tried: the files.
        program: the lowered program, with its weights.
        snapshot: what the slots hold at first; what a baked program holds.

    Raises:
        CompileError: naming the slots.
    """
    graphs = {name: widen_graph(graph) for name, graph in program.graphs.items()}
    run_self_test(tried, Program(graphs), snapshot)


class CpuProgram:
    """The emitted files of a program as ONNX Runtime runs them, in memory of their own.

    Args:
        program: what was emitted.
        plans: slots of every site.
        base: reads base weights.
        mode: as the engine's.
        files: the program, held, where it was written.
    """

    def __init__(
        self, program: Program, plans: Mapping[str, SitePlan], base: BaseReader, mode: str, files: ProgramFiles
    ) -> None:
        self.mode, self.files, self.base = mode, files, base
        self.slots = {name: slot for graph in program.graphs.values() for name, slot in graph.slots.items()}
        self.plans = select_reached_plans(self.slots, plans)
        self.buffers, self.memory = make_fused_buffers(self.plans, base) if self.fused else ({}, {})
        self._dtypes = {name: _output_dtypes(graph) for name, graph in program.graphs.items()}
        self._sessions: dict[str, ort.InferenceSession] = {}

    @property
    def fused(self) -> bool:
        """Whether weights are written in place."""
        return self.mode == "fused"

    def write(self, snapshot: ComposedWeights) -> int:
        """Make the weights hold a snapshot."""
        changes = {path: composed.change for path, composed in snapshot.composed.items()}
        return sum(buffer.write(changes.get(path)) for path, buffer in self.buffers.items())

    def outputs(self, graph: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """A graph's outputs for tensors in its slots and inputs by name."""
        given = {name: _widen_value(tensor.detach()).numpy() for name, tensor in {**inputs, **tensors}.items()}
        found = [torch.from_numpy(value) for value in self._session(graph).run(None, given)]
        dtypes = self._dtypes[graph][-len(found) :]
        return [value.to(dtype) if dtype in _HALF else value for value, dtype in zip(found, dtypes, strict=True)]

    def _session(self, graph: str) -> ort.InferenceSession:
        if graph not in self._sessions:
            self._sessions[graph] = _create_session(self.files, graph)
        return self._sessions[graph]


# ── The file ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _create_session(files: ProgramFiles, graph: str) -> ort.InferenceSession:
    """A session over a model, or where that computes in half precision over the same in float32."""
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    model, weights = read_model_files(files, graph)
    if not _widen_model(model):
        path = str(files[graph_file(graph, MODEL_FILE)].where)
        return ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    held = {name: _widen_array(array) for name, array in weights.items()}
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in held.values()]
    settings.add_external_initializers(list(held), values)
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    session.lorac_constants = held  # read where they lie for as long as the session lives
    return session


def _widen_model(model: onnx.ModelProto) -> bool:
    """Have a model compute in float32 what it computes in half precision; says whether there was any."""
    changed = False
    for graph in (model.graph, *walk_subgraphs(model.graph)):
        for value in (*graph.input, *graph.output, *graph.value_info):
            changed |= _widen_field(value.type.tensor_type, "elem_type")
        for tensor in (*graph.initializer, *_constants(graph)):
            changed |= _widen_tensor(tensor)
        told = (attribute for node in graph.node for attribute in node.attribute if attribute.name in _DTYPE_ATTRIBUTES)
        for attribute in told:
            changed |= _widen_field(attribute, "i")
    return changed


def _constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    attributes = (attribute for node in graph.node for attribute in node.attribute)
    yield from (attribute.t for attribute in attributes if attribute.type == onnx.AttributeProto.TENSOR)


def _widen_field(message: Any, field: str) -> bool:
    if getattr(message, field) not in _HALF_TYPES:
        return False
    setattr(message, field, onnx.TensorProto.FLOAT)
    return True


def _widen_tensor(tensor: onnx.TensorProto) -> bool:
    """A tensor in the model itself; of one that lies beside it, which is handed over, what is said."""
    if tensor.data_type not in _HALF_TYPES:
        return False
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return _widen_field(tensor, "data_type")
    tensor.CopyFrom(onnx.numpy_helper.from_array(_widen_array(onnx.numpy_helper.to_array(tensor)), tensor.name))
    return True


def _widen_array(array: Array) -> Array:
    half = array.dtype.itemsize == 2 and array.dtype.kind not in "iu"
    return np.ascontiguousarray(array.astype(np.float32) if half else array)


# ── The program ──────────────────────────────────────────────────────────────────────────────────────────────────────
def widen_graph(graph: Graph) -> Graph:
    """A graph that computes in float32 what this one computes in half precision; itself, where there is nothing."""
    module = graph.exported.graph_module
    if not any(_is_half(node.meta.get("val")) for node in module.graph.nodes):
        return graph
    whole = copy.deepcopy(module.graph)
    given = [node for node in whole.nodes if node.op == "placeholder"]
    for node, original in zip(whole.nodes, module.graph.nodes, strict=True):
        node.name = original.name
        if node.op == "call_function":
            node.args, node.kwargs = (fx.node.map_aggregate(told, _widen_dtype) for told in (node.args, node.kwargs))
    with whole.inserting_after(given[-1]):
        for node in given:
            _widen_input(whole, node)
    _restore_output_dtypes(whole)
    exported = copy.copy(graph.exported)
    exported._graph_module = fx.GraphModule(module, whole)
    return dataclasses.replace(graph, exported=exported)


def _widen_input(graph: fx.Graph, node: fx.Node) -> None:
    """Have everything that reads an input of half precision read it in float32."""
    if _is_half(node.meta.get("val")):
        cast = graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.float32})
        node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)


def _restore_output_dtypes(graph: fx.Graph) -> None:
    """Have a graph answer in the dtypes that it has been answering in."""
    last = graph.output_node()

    def cast(node: fx.Node) -> fx.Node:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dtype not in _HALF:
            return node
        with graph.inserting_before(last):
            return graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": value.dtype})

    last.args = fx.node.map_arg(last.args, cast)


def _output_dtypes(graph: Graph) -> list[torch.dtype | None]:
    """The dtypes of what a graph answers, its own outputs last."""
    answers: Any = graph.fx.output_node().args[0]
    values = (node.meta.get("val") if isinstance(node, fx.Node) else None for node in answers)
    return [value.dtype if isinstance(value, Tensor) else None for value in values]


def _widen_dtype(told: Any) -> Any:
    return torch.float32 if isinstance(told, torch.dtype) and told in _HALF else told


def _widen_value(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in _HALF
