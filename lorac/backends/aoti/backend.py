"""The aoti target: programs of aten ops that torch compiles to packages; these run without lorac, and from C++."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lorac.argument_types import JsonMapping
from lorac.backends.aoti.package import AotiEngine, PackagedGraph, check_compiler, compile_package
from lorac.backends.onnx.base_backend import OnnxBackend
from lorac.backends.onnx.emitted_program import EmittedProgram
from lorac.backends.onnx.engine import AnyOnnxEngine
from lorac.backends.onnx.model_files import BASE_FILE, graph_file
from lorac.errors import ArtifactError, OptionError
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.graph.graph import Program, SlotInput
from lorac.ir.graph.nodes import find_input_examples
from lorac.ir.graph.passes import PassResult
from lorac.ir.slots.composition import fill_slots
from lorac.ir.slots.plans import SitePlan
from lorac.ir.traces.gate import tracing
from lorac.limits import is_trusted
from lorac.progress import step
from lorac.storage.tensor_file import TensorFile
from lorac.target.backend import BuildRequest, TargetOptions
from lorac.target.dialect import refuse_unclaimed
from lorac.target.engine import ProgramFiles

if TYPE_CHECKING:
    from lorac.backends.onnx.passes import OnnxDialect

PACKAGE_FILE = "model.pt2"


@dataclass(frozen=True, kw_only=True)
class AotiOptions(TargetOptions):
    """Options of the aoti target: only those of every target."""

    def check(self) -> None:
        """Accept any extra output, since ``Backend.check`` checks the names."""


class AotInductor(OnnxBackend[AotiOptions, PackagedGraph]):
    """The target that compiles programs with torch's AOTInductor, for the CPU of this machine."""

    options = AotiOptions
    engine = AotiEngine

    def dialect_for(self, options: AotiOptions) -> OnnxDialect:
        from lorac.backends.aoti.dialect import DIALECT

        return DIALECT

    def list_files(self, graphs: Iterable[str]) -> list[str]:
        return [BASE_FILE, *(graph_file(name, PACKAGE_FILE) for name in graphs)]

    def list_unsupported(self, program: Program) -> tuple[str, ...]:
        from lorac.backends.aoti.dialect import list_foreign_ops

        return tuple(dict.fromkeys(op for graph in program.graphs.values() for op in list_foreign_ops(graph)))

    def check(self, request: BuildRequest[AotiOptions]) -> None:
        """Refuse to compile if there is no C++ compiler."""
        super().check(request)
        check_compiler()

    def check_program(self, program: Program, request: BuildRequest[AotiOptions]) -> None:
        """Refuse ops of other libraries, which a package would need on every machine."""
        refuse_unclaimed(self.dialect, self.list_unsupported(program))

    def write_graphs(
        self, request: BuildRequest[AotiOptions], program: Program, folder: Path
    ) -> Mapping[str, Mapping[str, PassResult]]:
        """Compile a program's graphs into packages."""
        from lorac.backends.aoti.dialect import make_plain_program

        step("C++")
        constant = request.mode == "baked"
        contents = fill_slots(request.plans, request.snapshot, request.base) if constant else {}
        for name, graph in program.graphs.items():
            slots = collect_slot_tensors(graph.slots, request.plans, contents) if constant else {}
            with tracing():
                plain = make_plain_program(graph, slots, constant=constant)
                public = {slot.node: slot.name for slot in graph.slots.values()}
                examples = find_input_examples(plain).items()
                inputs = {public.get(node, node): value.dtype for node, value in examples}
                compile_package(plain, folder / graph_file(name, PACKAGE_FILE), inputs)
        return {}

    def write_base_weights(self, emitted: EmittedProgram[AotiOptions]) -> None:
        TensorFile.write(emitted.folder / BASE_FILE, emitted.base_tensors())

    def test(self, engine: AnyOnnxEngine, emitted: EmittedProgram[AotiOptions]) -> None:
        from lorac.backends.onnx.self_test import run_self_test

        run_self_test(engine, emitted.program, emitted.request.snapshot, is_onnx=False)

    def load_graph(
        self,
        name: str,
        files: ProgramFiles,
        interface: Interface,
        slots: Mapping[str, SlotInput],
        stored: JsonMapping,
        options: AotiOptions,
    ) -> PackagedGraph:
        return PackagedGraph(files[graph_file(name, PACKAGE_FILE)].path, interface, slots)

    def restore_options(
        self, stored: JsonMapping, plans: Mapping[str, SitePlan], device: str | torch.device | None
    ) -> AotiOptions:
        """Return the options of an artifact, if the caller trusts its maker."""
        if not is_trusted():
            raise ArtifactError(
                "loading an artifact for target 'aoti' runs machine code",
                next_step="give trust=True if you made the artifact, or trust its maker",
            )
        if device is not None and torch.device(device).type != "cpu":
            raise OptionError(
                f"this program was compiled for the CPU, not for device '{device}'",
                nearest="cpu",
                next_step="leave device= out",
            )
        return AotiOptions(**stored)


BACKEND = AotInductor()
