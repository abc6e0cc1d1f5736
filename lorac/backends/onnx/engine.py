"""The base of engines made from emitted ONNX files, whichever library runs them."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from lorac.frontend.components import check_component
from lorac.ir.graph.feeds import convert_input, group_aux_outputs
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.plans import SitePlan
from lorac.report.dump import Dump
from lorac.target.backend import TargetOptions
from lorac.target.engine import BoundProgram, CallResult, ProgramFiles
from lorac.target.placed_engine import PlacedEngine, ProgramGraph


class LoadedGraph(ProgramGraph, Protocol):
    """One graph of the program as the library runs it.

    Attributes:
        dtypes: the dtype of every input of the model; None for one that torch does not have.
    """

    @property
    def dtypes(self) -> Mapping[str, torch.dtype | None]: ...


class SlotContent(Protocol):
    """Slot contents of a choice of adapters, in the library's form.

    Attributes:
        tensors: slot input -> tensor.
    """

    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


GraphT = TypeVar("GraphT", bound=LoadedGraph)
OptionsT = TypeVar("OptionsT", bound=TargetOptions)
ContentT = TypeVar("ContentT", bound=SlotContent)


@dataclass(frozen=True, eq=False, kw_only=True)
class LoadedProgram(Generic[GraphT, OptionsT]):
    """An emitted program whose graphs are loaded, and all else that an engine runs it with.

    Attributes:
        graphs: graph name -> the graph, loaded.
        plans: slots of every site.
        base: reads base weights without the model.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        files: the emitted program and the base weights, open.
    """

    graphs: Mapping[str, GraphT]
    plans: Mapping[str, SitePlan]
    base: BaseReader
    mode: str
    files: ProgramFiles
    options: OptionsT


class OnnxEngine(PlacedEngine[GraphT, ContentT], Generic[GraphT, OptionsT, ContentT]):
    """Runs a program from its files, one loaded graph per graph of the program.

    A target says how slot tensors are laid out (``lay_out``) and how a graph is run (``run_graph``).
    """

    def __init__(self, program: LoadedProgram[GraphT, OptionsT]) -> None:
        self.program, self.options = program, program.options
        super().__init__(program.graphs, program.plans, program.base, program.mode, program.files)
        self.interfaces = {
            name: graph.interface.with_notes(*self.machine_notes(graph)) for name, graph in self.graphs.items()
        }
        self.fused_content = self.lay_out(self.memory, fixed=True)

    @abstractmethod
    def lay_out(self, tensors: Mapping[str, Tensor], *, fixed: bool = False) -> ContentT:
        """Return slot tensors as the library reads them.

        Args:
            tensors: slot input -> tensor.
            fixed: they are weights that are written in place.
        """

    @abstractmethod
    def run_graph(self, graph: str, content: ContentT, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run a graph once; return its outputs in order.

        Args:
            content: what ``lay_out`` returned.
            inputs: by name, contiguous and of the graph's dtypes.
        """

    def machine_notes(self, graph: GraphT) -> tuple[str, ...]:
        """Return notes for callers of a graph on this machine, each a sentence."""
        return ()

    def slot_tensors(self, content: ContentT) -> Mapping[str, Tensor]:
        return content.tensors

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> BoundProgram[ContentT]:
        return BoundProgram(self, self.lay_out(tensors))

    @property
    def written_program(self) -> BoundProgram[ContentT]:
        return BoundProgram(self, self.fused_content)

    def dump(self) -> dict[str, Dump]:
        from lorac.backends.onnx.model_dump import dump_model  # a call does not need it

        return {name: dump_model(self.files, name, graph.slots) for name, graph in self.graphs.items()}

    @property
    def constant(self) -> bool:
        return self.mode == "baked"

    def call(self, content: ContentT, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> CallResult:
        loaded = self.graphs[check_component(graph, self.graphs)]

        def run(inputs: Mapping[str, object]) -> list[object]:
            outputs = self.run_graph(graph, content, convert_inputs(loaded, inputs))
            return [match_inputs(value, inputs) for value in outputs]

        output, extra = loaded.interface.run(args, kwargs, run)
        return CallResult(output, group_aux_outputs(extra, content.tensors))

    def outputs(self, graph: str, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return copies of a graph's outputs for tensors in its slots and inputs by name, as the self-test asks."""
        converted = convert_inputs(self.graphs[graph], inputs)
        return [value.clone() for value in self.run_graph(graph, self.lay_out(tensors), converted)]


def convert_inputs(graph: LoadedGraph, inputs: Mapping[str, object]) -> dict[str, Tensor]:
    """Return inputs as contiguous tensors of the dtypes that a graph takes."""
    return {name: convert_input(name, value, graph.dtypes[name]) for name, value in inputs.items()}


def match_inputs(value: Tensor, inputs: Mapping[str, object]) -> object:
    """Return an output as the inputs are: an array where all of them are arrays, else a tensor on their device."""
    if all(isinstance(one, np.ndarray) for one in inputs.values()):
        value = value.cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()  # NumPy has no bfloat16
    devices = [one.device for one in inputs.values() if isinstance(one, Tensor)] or [value.device]
    return value.to(next((device for device in devices if device.type != "cpu"), devices[0]))


AnyOnnxEngine = OnnxEngine[Any, Any, Any]
