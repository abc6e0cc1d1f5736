"""The base class of engines for emitted ONNX files, independent of the library that runs them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorac.ir.calls.call import Call
from lorac.ir.graph.feeds import convert_input, group_aux_outputs
from lorac.ir.slots.prefix import IDS
from lorac.report.dump import Dump
from lorac.target.backend import OptionsT
from lorac.target.engine import CallResult
from lorac.target.placed_engine import (
    LoadedProgram,
    PlacedEngine,
    PlacedProgram,
    ProgramGraph,
    translate_program_errors,
)


class LoadedGraph(ProgramGraph, Protocol):
    """One graph of the program, loaded by the library that runs it.

    Attributes:
        dtypes: the dtype of every input of the model; None for a dtype that torch lacks.
    """

    @property
    def dtypes(self) -> Mapping[str, torch.dtype | None]: ...


GraphT = TypeVar("GraphT", bound=LoadedGraph)


class OnnxEngine(PlacedEngine[GraphT], Generic[GraphT, OptionsT]):
    """An engine that runs a program from its files, with one loaded graph per graph of the program.

    A target binds slot tensors (``bind_tensors``) to its own subclass of ``OnnxProgram``, which runs a graph.
    """

    def __init__(self, program: LoadedProgram[GraphT, OptionsT]) -> None:
        self.program, self.options = program, program.options
        super().__init__(program)
        self.interfaces = {
            name: graph.interface.with_notes(*self.machine_notes(graph)) for name, graph in self.graphs.items()
        }

    @abstractmethod
    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> OnnxProgram: ...

    def machine_notes(self, graph: GraphT) -> tuple[str, ...]:
        """Return notes for callers of a graph that apply to this machine, one sentence each."""
        return ()

    @property
    def written_program(self) -> OnnxProgram:
        return self.bind_tensors(self.memory)

    def dump(self) -> dict[str, Dump]:
        from lorac.backends.onnx.model_dump import dump_model  # a call does not need it

        return {name: dump_model(self.files, name, graph.slots) for name, graph in self.graphs.items()}

    @property
    def constant(self) -> bool:
        return self.mode == "baked"

    def outputs(self, graph: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return copies of a graph's outputs for tensors in its slots and inputs by name, for the self-test."""
        converted = convert_inputs(self.graphs[graph], inputs)
        return [value.clone() for value in self.bind_tensors(tensors).run_graph(graph, converted)]


@dataclass(frozen=True, eq=False)
class OnnxProgram(PlacedProgram, ABC):
    """A program from emitted files with the tensors of one choice of adapters."""

    engine: OnnxEngine[Any, Any]

    @abstractmethod
    def run_graph(self, graph: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run a graph once; return its outputs in order.

        Args:
            inputs: the inputs by name, contiguous and of the graph's dtypes.
        """

    def run(self, graph: str, call: Call) -> CallResult:
        loaded, prefix = self.engine.graphs[graph], self.prefix

        def run(inputs: Mapping[str, object]) -> Sequence[object]:
            if prefix is not None:
                inputs = prefix.extend(inputs)
            with translate_program_errors():
                return match_inputs(self.run_graph(graph, convert_inputs(loaded, inputs)), inputs)

        output, extra = loaded.interface.run(call, run)
        output = output if prefix is None else prefix.trim(output, torch.as_tensor(call.kwargs[IDS]).shape[1])
        return CallResult(output, group_aux_outputs(extra, self.tensors) if extra else {})


@dataclass(frozen=True, eq=False)
class SlotInputProgram(OnnxProgram):
    """A program whose graphs take the slots as further inputs of each call."""

    def run_graph(self, graph: str, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        outputs: list[Tensor] = self.engine.graphs[graph].run({**self.tensors, **inputs})
        return outputs


def convert_inputs(graph: LoadedGraph, inputs: Mapping[str, object]) -> dict[str, Tensor]:
    """Convert inputs to contiguous tensors of the graph's dtypes."""
    converted: dict[str, Tensor] = {}
    for name, value in inputs.items():
        dtype = graph.dtypes[name]
        if isinstance(value, Tensor) and value.dtype is dtype and value.is_contiguous() and not value.requires_grad:
            converted[name] = value
        else:
            converted[name] = convert_input(name, value, dtype)
    return converted


def match_inputs(outputs: Sequence[Tensor], inputs: Mapping[str, object]) -> Sequence[object]:
    """Convert outputs to the inputs' kind: arrays if all inputs are arrays, otherwise tensors on the inputs' device."""
    if all(isinstance(value, np.ndarray) for value in inputs.values()):  # NumPy has no bfloat16
        return [(value.float() if value.dtype == torch.bfloat16 else value).numpy(force=True) for value in outputs]
    devices = [value.device for value in inputs.values() if isinstance(value, Tensor)]
    if not devices:
        return outputs
    place = next((device for device in devices if device.type != "cpu"), devices[0])
    return [value.to(place) for value in outputs]


AnyOnnxEngine = OnnxEngine[Any, Any]
