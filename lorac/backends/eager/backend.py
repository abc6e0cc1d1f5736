"""The eager target; its programs are stored as nodes and tensors, since storing a module would need pickle."""

import functools
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from lorac.argument_types import JsonMapping
from lorac.backends.eager.engine import EagerEngine
from lorac.backends.eager.layer_forwards import disable_fast_path, match_linear_rounding
from lorac.backends.eager.stored_program import StoredGraph, StoredProgramEngine
from lorac.errors import ArtifactError, Unavailable
from lorac.frontend.base_weights import collect_base_tensors
from lorac.frontend.copying import separate_layers
from lorac.frontend.host import Host
from lorac.frontend.quantised_weights import is_bitsandbytes_layer
from lorac.ir.graph.feeds import collect_slot_tensors
from lorac.ir.graph.graph import Graph, Level, Program, SlotInput
from lorac.ir.sites.site import Site
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.ir.slots.places import as_place
from lorac.ir.slots.plans import SitePlan, list_layers
from lorac.ir.traces.gate import tracing
from lorac.limits import charge_reading
from lorac.storage.plans import graph_from_json, graph_to_json
from lorac.storage.program import StoredProgram, collect_tensors, make_functional, program_to_json
from lorac.storage.strict_json import parse_json, read_json_text
from lorac.storage.tensor_file import TensorFile, make_file_base_reader
from lorac.target.backend import Backend, BuildRequest, StoredState, TargetOptions
from lorac.target.dialect import AnyDialect, BranchGate, Dialect
from lorac.target.engine import Engine, ProgramFiles
from lorac.target.placed_engine import LoadedProgram, ProgramGraph

_PROGRAM, _WEIGHTS = "program.json", "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class EagerOptions(TargetOptions):
    """Options of the eager target: only those of every target."""

    def check(self) -> None:
        """Accept any extra output, since the engine checks the names."""


class EagerBackend(Backend[EagerOptions]):
    """The target that runs the model's own code, in any dtype, and that can train."""

    dialect: AnyDialect = Dialect(
        name="eager",
        gates=BranchGate.NONE,
        fuses_projections=False,  # a stored program would concatenate the fused matrix at every call
        dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
        rows=True,
        why_branches_shared="its branches have one place in a stored program",
    )
    options = EagerOptions

    def build(self, request: BuildRequest[EagerOptions]) -> EagerEngine:
        module = Host.of(request.model).copy().model
        separate_layers(module, list_layers(request.plans.values()))
        for layer in filter(is_bitsandbytes_layer, module.modules()):
            # The library's own method unpacks and rounds the weight; the copy's state dict has no weights anyway.
            layer._save_to_state_dict = functools.partial(nn.Module._save_to_state_dict, layer)  # type: ignore[method-assign]  # of a copy
        match_linear_rounding(request.model, module)
        disable_fast_path(request.model, module, request.plans, lambda: engine.current_slots().touched)
        engine = EagerEngine(module, request)
        if request.mode == "baked":
            engine.write(request.snapshot)
        return engine

    def store(self, engine: Engine, folder: Path, request: BuildRequest[EagerOptions] | None) -> StoredState:
        """Write the program and its weights, including the base weights of planned sites."""
        if isinstance(engine, StoredProgramEngine):
            for name, file in engine.files.items():
                file.copy_to(folder / name)
            return {"graphs": _graphs_to_json(engine.graphs)}
        assert request is not None
        assert request.program is not None
        program = request.program
        exported = {name: make_functional(graph.exported) for name, graph in program.graphs.items()}
        nodes = {name: program_to_json(graph) for name, graph in exported.items()}
        text = json.dumps(nodes, separators=(",", ":"), allow_nan=False)
        (folder / _PROGRAM).write_text(text, encoding="utf-8")
        tensors = collect_base_tensors(request.model, {path: plan.site for path, plan in request.plans.items()})
        for graph in exported.values():
            tensors |= collect_tensors(graph)
        TensorFile.write(folder / _WEIGHTS, tensors)
        return {"graphs": _graphs_to_json(program.graphs)}

    def restore(
        self,
        stored: StoredState,
        files: ProgramFiles,
        plans: Mapping[str, SitePlan],
        mode: str,
        device: str | torch.device | None,
    ) -> StoredProgramEngine:
        """Build an engine that runs the stored program; it cannot train."""
        target_device = None if device is None else torch.device(device)
        if target_device is not None and target_device.type != "cpu" and mode == "fused":
            raise Unavailable(
                "a fused eager artifact runs on the CPU only",
                next_step="save it in live mode, or load it with target='onnxruntime'",
            )
        file = self.read_base_weights(files)
        parts = _load_graphs(stored, files, file)
        for part in parts.values():
            part.program.to(target_device)
        base = make_file_base_reader(file)
        own = {name: files[name] for name in (_PROGRAM, _WEIGHTS)}
        program = LoadedProgram(graphs=parts, plans=plans, base=base, mode=mode, files=own, options=EagerOptions())
        return StoredProgramEngine(program, target_device)

    def read_base_weights(self, files: ProgramFiles) -> TensorFile:
        return TensorFile(files[_WEIGHTS])

    def restore_program(
        self, stored: StoredState, files: ProgramFiles, sites: Mapping[str, Site], plans: Mapping[str, SitePlan]
    ) -> Program:
        file = self.read_base_weights(files)
        base, found = make_file_base_reader(file), dict[str, Graph]()
        for name, part in _load_graphs(stored, files, file).items():
            own = {slot.site for slot in part.slots.values()}
            planned = {path: plan for path, plan in plans.items() if path in own}
            # All rows of a call share their slots, which have no axis of places.
            shared = {key: replace(slot, placed=False) for key, slot in part.slots.items()}
            neutral = collect_slot_tensors(shared, planned, fill_slots(planned, ComposedWeights(()), base))
            placed = {slot.node: slot for slot in part.slots.values() if slot.placed}
            examples, shapes = dict(part.program.examples), dict(part.program.dynamic)
            for node, slot in placed.items():
                more = examples[node].dim() - neutral[slot.name].dim()
                examples[node] = examples[node][(0,) * more].clone()
                shapes[node] = tuple(axis - more for axis in shapes[node] if axis >= more)
            dynamic = {node: dict.fromkeys(axes, Dim.AUTO) for node, axes in shapes.items()}
            with tracing(), torch.no_grad():
                program = _OnePlace(part.program, placed)
                exported = torch.export.export(program, (), examples, dynamic_shapes=dynamic)
            found[name] = Graph(name, exported, sites, planned, part.interface, level=Level.EXPANDED, slots=shared)
        return Program(found)


BACKEND = EagerBackend()


def _graphs_to_json(graphs: Mapping[str, ProgramGraph]) -> dict[str, JsonMapping]:
    return {name: graph_to_json(graph.interface, graph.slots.values()) for name, graph in graphs.items()}


class _OnePlace(nn.Module):
    """A stored program whose slots have exactly one place, without an axis for it.

    Args:
        placed: input -> slot, for the slots that have an axis of places.
    """

    def __init__(self, program: StoredProgram, placed: Mapping[str, SlotInput]) -> None:
        super().__init__()
        self.program = program

        def forward(**given: Tensor) -> tuple[Tensor, ...]:
            slots = {node: as_place(given[node], by_token=slot.by_token) for node, slot in placed.items()}
            outputs: tuple[Tensor, ...] = program(**{**given, **slots})
            return outputs

        forward.__signature__ = inspect.signature(program.forward)  # type: ignore[attr-defined]  # functions take attributes
        self.forward = forward


def _load_graphs(stored: StoredState, files: ProgramFiles, file: TensorFile) -> dict[str, StoredGraph]:
    entries: JsonMapping = stored["graphs"]  # type: ignore[assignment]  # checked by what reads an entry

    def read() -> dict[str, StoredProgram]:
        text = read_json_text(files[_PROGRAM].path)
        nodes = parse_json(text, lambda reason: ArtifactError(f"'{files[_PROGRAM].where}' {reason}"))
        return {name: StoredProgram(nodes[name], file) for name in entries}

    programs = charge_reading(files[_PROGRAM].where, read)
    return {name: StoredGraph(programs[name], *graph_from_json(entry)) for name, entry in entries.items()}
