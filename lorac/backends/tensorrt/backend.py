"""The tensorrt target: ONNX files built into plans, with slot inputs in the GPU's memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from lorac.argument_types import JsonMapping
from lorac.backends.onnx.base_backend import OnnxBackend
from lorac.backends.onnx.engine import AnyOnnxEngine
from lorac.backends.onnx.model_files import SlotStorage, graph_file, list_program_files
from lorac.backends.tensorrt.device.requirements import check_capability, current_device, find_maker
from lorac.backends.tensorrt.engine import PLAN_FILE, GraphPlan, PlanFacts, TrtEngine
from lorac.backends.tensorrt.library import find_library, local_capability
from lorac.backends.tensorrt.options import TensorRTOptions
from lorac.backends.tensorrt.profiles import check_profile_names
from lorac.errors import OptionError, Unavailable
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.graph import Program, SlotInput
from lorac.progress import step
from lorac.target.backend import BuildRequest
from lorac.target.engine import ProgramFiles

if TYPE_CHECKING:
    from lorac.backends.onnx.emitted_program import EmittedProgram
    from lorac.backends.onnx.passes import OnnxDialect

    Emitted = EmittedProgram[TensorRTOptions]


class TensorRT(OnnxBackend[TensorRTOptions, GraphPlan]):
    """The target that emits ONNX and builds TensorRT plans; methods import modules that only building needs."""

    options = TensorRTOptions
    engine = TrtEngine

    def dialect_for(self, options: TensorRTOptions) -> OnnxDialect:
        from lorac.backends.tensorrt.dialect import DIALECT

        return DIALECT

    def place_options(self, options: TensorRTOptions, device: torch.device | None) -> TensorRTOptions:
        """Return the options for a GPU, which this machine need not have, since plans can be built without it."""
        if device is None:
            return options
        if device.type != "cuda":
            raise OptionError(
                f"target 'tensorrt' runs on NVIDIA GPUs, and not on device '{device}'",
                nearest="cuda",
                next_step="leave device= out; target='onnxruntime' and target='eager' run on the CPU",
            )
        return dataclasses.replace(options, device=str(device))

    def list_files(self, graphs: Iterable[str]) -> list[str]:
        names = list(graphs)
        return [*list_program_files(names), *(graph_file(name, PLAN_FILE) for name in names)]

    def check(self, request: BuildRequest[TensorRTOptions]) -> None:
        """Refuse ``refit=True`` if no weight is merged, or if the library cannot build such a plan.

        Raises:
            OptionError: the program has no merged weights.
            Unavailable: this machine has no GPU, or not the requested one.
        """
        super().check(request)
        with current_device(request.options.device):
            capability = local_capability()
        if request.options.refit and request.mode != "fused":
            raise OptionError(
                f"refit=True replaces merged weights, which a program in mode '{request.mode}' lacks",
                next_step="give mode='fused' with it, or leave it out",
            )
        if request.options.refit and capability is None:
            raise Unavailable(
                "refit=True needs an NVIDIA GPU: the library builds plans with replaceable constants only there",
                next_step="leave it out: mode='fused' takes merged weights as inputs, and builds anywhere",
            )

    def check_program(self, program: Program, request: BuildRequest[TensorRTOptions]) -> None:
        """Refuse ``profiles=`` with a name that is no input or axis of the program."""
        check_profile_names(request.options.profiles, program.graphs.values())

    def slot_storage(self, request: BuildRequest[TensorRTOptions]) -> SlotStorage:
        return SlotStorage.CONSTANTS if request.options.refit else super().slot_storage(request)

    def load_graphs(self, emitted: Emitted) -> tuple[Mapping[str, GraphPlan], ProgramFiles]:
        """Test the emitted files on the CPU, and build a plan from each."""
        from lorac.backends.tensorrt.build import build_plan
        from lorac.backends.tensorrt.cpu_check import check_on_cpu

        if emitted.request.options.self_test:
            step("self-test")
            check_on_cpu(self, emitted)
        step("plans")
        with current_device(emitted.request.options.device):
            facts = {name: build_plan(emitted, name) for name in emitted.program.graphs}
        files, program = emitted.open_files(), emitted.program
        graphs = {
            name: GraphPlan(
                file=files[graph_file(name, PLAN_FILE)], interface=graph.interface, slots=graph.slots, facts=facts[name]
            )
            for name, graph in program.graphs.items()
        }
        return graphs, files

    def test(self, engine: AnyOnnxEngine, emitted: Emitted) -> None:
        """Do nothing, since the files were tested before plans were built from them."""

    def graph_to_json(self, graph: GraphPlan) -> dict[str, object]:
        return graph.facts.to_json()

    def options_to_json(self, options: TensorRTOptions) -> dict[str, object]:
        """Return the options, with the name of the library that built the plans."""
        return super().options_to_json(dataclasses.replace(options, library=options.builder.name))

    def load_graph(
        self,
        name: str,
        files: ProgramFiles,
        interface: Interface,
        slots: Mapping[str, SlotInput],
        stored: JsonMapping,
        options: TensorRTOptions,
    ) -> GraphPlan:
        """Return a stored plan; the first call loads it with the library that built it.

        Raises:
            ArtifactError: the plan was built by a library or release that this machine does not have.
            Unavailable: the plan is for other GPUs.
        """
        find_maker(stored["made_by"])
        facts = PlanFacts.from_json(stored)
        _check_gpu(facts, options.device)
        return GraphPlan(file=files[graph_file(name, PLAN_FILE)], interface=interface, slots=slots, facts=facts)


BACKEND = TensorRT()
find_library()  # report a missing library when the target is chosen, instead of at the first build


def _check_gpu(facts: PlanFacts, device: str | None) -> None:
    """Refuse a plan for other GPUs, if this machine has a GPU."""
    with current_device(device):
        capability = local_capability()
        if capability is not None:
            check_capability(capability, facts.capabilities, torch.cuda.get_device_name(), find_maker(facts.made_by))
