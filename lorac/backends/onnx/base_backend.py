"""The base class of backends that run emitted ONNX files: they build, store and restore such programs."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic

import torch

from lorac.argument_types import JsonMapping
from lorac.backends.onnx.emitted_program import EmittedProgram
from lorac.backends.onnx.engine import AnyOnnxEngine, GraphT, OnnxEngine
from lorac.backends.onnx.model_files import BASE_FILE, SlotStorage, list_program_files
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.graph import Program, SlotInput
from lorac.ir.graph.passes import PassResult
from lorac.ir.sites.site import BaseReader
from lorac.ir.slots.plans import SitePlan
from lorac.progress import step
from lorac.storage.plans import graph_from_json, graph_to_json
from lorac.storage.process_folders import make_temporary_folder, remove_with_owner
from lorac.storage.tensor_file import TensorFile, make_file_base_reader
from lorac.target.backend import Backend, BuildRequest, OptionsT, StoredState
from lorac.target.engine import Engine, ProgramFiles
from lorac.target.placed_engine import LoadedProgram

if TYPE_CHECKING:
    from lorac.backends.onnx.passes import OnnxDialect, OnnxPass


class OnnxBackend(Backend[OptionsT], Generic[OptionsT, GraphT]):
    """A target that runs ONNX files.

    A subclass defines its dialect, its options and the class of its engines, and loads a graph from files.

    Attributes:
        engine: the class of the target's engines.
    """

    engine: ClassVar[type[AnyOnnxEngine]]

    @abstractmethod
    def dialect_for(self, options: OptionsT) -> OnnxDialect:
        """Return the dialect for the given options; import it here, since loading an artifact does not need it."""

    @abstractmethod
    def load_graph(
        self,
        name: str,
        files: ProgramFiles,
        interface: Interface,
        slots: Mapping[str, SlotInput],
        stored: JsonMapping,
        options: OptionsT,
    ) -> GraphT:
        """Load a graph from its files.

        Args:
            files: the open files of the program.
            interface: its inputs and outputs.
            slots: its slot inputs, by public name.
            stored: the result of ``graph_to_json``; empty if the graph was just emitted.
        """

    def graph_to_json(self, graph: GraphT) -> dict[str, object]:
        """Return the state that ``load_graph`` needs besides the interface and the slots, as JSON."""
        return {}

    def list_files(self, graphs: Iterable[str]) -> list[str]:
        """Return the names of all files that a program may have."""
        return list_program_files(graphs)

    def check_program(self, program: Program, request: BuildRequest[OptionsT]) -> None:
        """Refuse a program that cannot be built, before it is emitted."""

    def check_emitted(self, emitted: EmittedProgram[OptionsT]) -> None:
        """Refuse a program because of the reports of passes over its models."""

    def slot_storage(self, request: BuildRequest[OptionsT]) -> SlotStorage:
        """Return the place where the content of slots is written."""
        return SlotStorage.CONSTANTS if request.mode == "baked" else SlotStorage.NOWHERE

    def weight_passes(self, request: BuildRequest[OptionsT]) -> Sequence[OnnxPass]:
        """Return the passes to run over the emitted models after slots are filled."""
        return ()

    def write_base_weights(self, emitted: EmittedProgram[OptionsT]) -> None:
        """Write the base weights of planned sites."""
        from lorac.backends.onnx.build import write_base_weights

        write_base_weights(emitted, emitted.base_tensors())

    def test(self, engine: AnyOnnxEngine, emitted: EmittedProgram[OptionsT]) -> None:
        """Compare the engine with the program from which it was emitted.

        Raises:
            CompileError: naming the slots that were lost.
        """
        from lorac.backends.onnx.self_test import run_self_test

        run_self_test(engine, emitted.program, emitted.request.snapshot)

    def emit(self, request: BuildRequest[OptionsT], folder: Path) -> EmittedProgram[OptionsT]:
        """Write a program's models and base weights into a folder.

        Raises:
            Unavailable: the target does not compute an op.
        """
        program = request.program
        assert program is not None
        self.check_program(program, request)
        step("emission")
        emitted = EmittedProgram(
            request=request,
            program=program,
            folder=folder,
            file_names=tuple(self.list_files(program.graphs)),
            results=self.write_graphs(request, program, folder),
        )
        self.check_emitted(emitted)
        if request.mode != "baked":
            self.write_base_weights(emitted)
        return emitted

    def write_graphs(
        self, request: BuildRequest[OptionsT], program: Program, folder: Path
    ) -> Mapping[str, Mapping[str, PassResult]]:
        """Write a program's models; return graph -> pass over the emitted program -> its result."""
        from lorac.backends.onnx.build import write_models

        dialect, passes = self.dialect_for(request.options), self.weight_passes(request)
        return write_models(request, program, folder, dialect, passes, self.slot_storage(request))

    @property
    def emits(self) -> bool:
        """True. Asking this does not import the dialect and the libraries that it needs."""
        return True

    @functools.cached_property
    def dialect(self) -> OnnxDialect:  # type: ignore[override]  # nobody sets it
        """The dialect for the target's default options."""
        return self.dialect_for(self.options())

    def list_unsupported(self, program: Program) -> tuple[str, ...]:
        from lorac.backends.onnx.emit import list_unsupported_ops

        return list_unsupported_ops(program, self.dialect)

    def build(self, request: BuildRequest[OptionsT]) -> AnyOnnxEngine:
        """Build an engine, which does not reference the model."""
        folder = make_temporary_folder()
        try:
            engine = self.load(self.emit(request, folder))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        remove_with_owner(engine, folder)
        return engine

    def load(self, emitted: EmittedProgram[OptionsT]) -> AnyOnnxEngine:
        """Load the emitted graphs into an engine, and test it."""
        request = emitted.request
        graphs, files = self.load_graphs(emitted)
        base = self.base_reader(files) or request.base
        engine = self.engine(
            LoadedProgram(
                graphs=graphs, plans=request.plans, base=base, mode=request.mode, files=files, options=request.options
            )
        )
        engine.skipped = emitted.skipped
        if request.options.self_test:
            step("self-test")
            self.test(engine, emitted)
        return engine

    def load_graphs(self, emitted: EmittedProgram[OptionsT]) -> tuple[Mapping[str, GraphT], ProgramFiles]:
        """Load the emitted graphs; return them with the files that the engine keeps open."""
        step("loading")
        files, options = emitted.open_files(), emitted.request.options
        program = emitted.program
        graphs = {
            name: self.load_graph(name, files, graph.interface, graph.slots, {}, options)
            for name, graph in program.graphs.items()
        }
        return graphs, files

    def base_reader(self, files: ProgramFiles) -> BaseReader | None:
        """Return a reader of the base weights in a program's files; None if the files have none."""
        tensors = self.read_base_weights(files)
        return None if tensors is None else make_file_base_reader(tensors)

    def store(self, engine: Engine, folder: Path, request: BuildRequest[OptionsT] | None) -> StoredState:
        """Copy the emitted models, the files that were built from them, and the base weights."""
        assert isinstance(engine, OnnxEngine)
        for name, file in engine.files.items():
            file.copy_to(folder / name)
        graphs = {
            name: {**graph_to_json(graph.interface, graph.slots.values()), **self.graph_to_json(graph)}
            for name, graph in engine.graphs.items()
        }
        return {"graphs": graphs, "options": self.options_to_json(engine.options)}

    def options_to_json(self, options: OptionsT) -> dict[str, object]:
        """Return the options that an artifact stores."""
        return {name: value for name, value in dataclasses.asdict(options).items() if name not in options.local}

    def restore(
        self,
        stored: StoredState,
        files: ProgramFiles,
        plans: Mapping[str, SitePlan],
        mode: str,
        device: str | torch.device | None,
    ) -> AnyOnnxEngine:
        """Load an engine from the files of an artifact.

        Raises:
            ArtifactError, Unavailable: the target cannot load these files on this machine.
        """
        known: JsonMapping = stored
        options = self.restore_options(known["options"], plans, device)
        graphs = {}
        for name, entry in known["graphs"].items():
            interface, slots = graph_from_json(entry)
            graphs[name] = self.load_graph(name, files, interface, slots, entry, options)
        program_files = {name: files[name] for name in self.list_files(graphs) if name in files}
        base = self.base_reader(program_files) or make_file_base_reader({})
        return self.engine(
            LoadedProgram(graphs=graphs, plans=plans, base=base, mode=mode, files=program_files, options=options)
        )

    def restore_options(
        self, stored: JsonMapping, plans: Mapping[str, SitePlan], device: str | torch.device | None
    ) -> OptionsT:
        """Return the options of an artifact; set the device if one is given."""
        options = self.options(**stored)
        if device is None or hasattr(options, "device"):
            return options if device is None else dataclasses.replace(options, device=str(device))  # type: ignore[call-arg]  # of targets with devices
        return self.place_options(options, torch.device(device))

    def read_base_weights(self, files: ProgramFiles) -> Mapping[str, torch.Tensor] | None:
        return TensorFile(files[BASE_FILE], files) if BASE_FILE in files else None
