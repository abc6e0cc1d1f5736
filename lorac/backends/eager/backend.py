"""The eager target: what it builds, and how it is stored: as nodes and tensors, since a module needs pickle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from lorac.backends.eager.engine import EagerEngine
from lorac.backends.eager.fastpath import run_layers_inside
from lorac.backends.eager.products import multiply_as
from lorac.backends.eager.program import ProgramEngine, StoredGraph
from lorac.errors import Unavailable
from lorac.ir.engine import AnyDialect, Backend, BuildRequest, Dialect, Engine, Files, Gate, Stored, TargetOptions
from lorac.ir.graph.graph import Graph, Level
from lorac.ir.graph.program import Program
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.copying import structural_copy
from lorac.ir.host.sites import Site
from lorac.ir.slots.emits import refuse_unemitted
from lorac.ir.slots.site import SitePlan
from lorac.ir.store.plans import slot_from_json, slot_to_json
from lorac.ir.store.program import StoredProgram, tensors_of, to_json
from lorac.ir.store.tensors import TensorFile, base_tensors, file_base

_PROGRAM, _WEIGHTS = "program.json", "weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class Options(TargetOptions):
    """Options of the eager target: those that all have."""

    def check(self) -> None:
        """Nothing: any name may be asked for here."""


class Eager(Backend[Options]):
    """Runs the host's own code; computes in any dtype, and trains."""

    dialect: AnyDialect = Dialect(
        name="eager",
        gates=Gate.NONE,
        packs=False,  # what is saved runs as it is, and a matrix made of several would be made at every call
        dtypes=(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    )
    options = Options

    def build(self, request: BuildRequest[Options]) -> EagerEngine:
        """An engine over a structural copy of the host."""
        refuse_unemitted(request.options.aux, request.plans.values())
        module = structural_copy(request.model)
        multiply_as(request.model, module)
        run_layers_inside(request.model, module, request.plans, lambda: engine.filled().touched)
        engine = EagerEngine(
            module,
            request.plans,
            request.base,
            sites=request.sites,
            mode=request.mode,
            terms=request.terms,
            aux=request.options.aux,
        )
        if request.mode == "baked":
            engine.write(request.snapshot)
        return engine

    def store(self, engine: Engine, folder: Path, request: Callable[[], BuildRequest[Options]]) -> Stored:
        """Write the program and its weights, the base weights of planned sites among them."""
        if isinstance(engine, ProgramEngine):
            for name, held in engine.files.items():
                held.copy_to(folder / name)
            return {"graphs": {name: _described(p.signature, p.slots) for name, p in engine.parts.items()}}
        made = request()
        program = made.program(made.options.aux)
        nodes = {name: to_json(graph.exported) for name, graph in program.graphs.items()}
        text = json.dumps(nodes, separators=(",", ":"), allow_nan=False)
        (folder / _PROGRAM).write_text(text, encoding="utf-8")
        tensors = base_tensors(made.model, {path: plan.site for path, plan in made.plans.items()})
        for graph in program.graphs.values():
            tensors |= tensors_of(graph.exported)
        TensorFile.write(folder / _WEIGHTS, tensors)
        return {"graphs": {name: _described(program.signatures[name], g.slots) for name, g in program.graphs.items()}}

    def restore(
        self, stored: Stored, files: Files, plans: Mapping[str, SitePlan], mode: str, device: str | torch.device | None
    ) -> ProgramEngine:
        """An engine that runs the stored program; it answers, and does not train."""
        place = None if device is None else torch.device(device)
        if place is not None and place.type != "cpu" and mode == "fused":
            raise Unavailable(
                "a fused eager artefact runs on the CPU only",
                next_step="save it in live mode, or load it with target='onnxruntime'",
            )
        file = self.base_of(files)
        parts = _parts(stored, files, file)
        for part in parts.values():
            part.program.to(place)
        base = file_base(file)
        kept = {name: files[name] for name in (_PROGRAM, _WEIGHTS)}
        return ProgramEngine(parts=parts, plans=plans, base=base, mode=mode, files=kept, device=place)

    def base_of(self, files: Files) -> TensorFile:
        """The base weights, which lie beside those of the program."""
        return TensorFile(files[_WEIGHTS])

    def program_of(
        self, stored: Stored, files: Files, sites: Mapping[str, Site], plans: Mapping[str, SitePlan]
    ) -> Program:
        """The stored program as graphs again, at level expanded."""
        parts = _parts(stored, files, self.base_of(files))
        graphs = {name: _graph(name, part, sites, plans) for name, part in parts.items()}
        return Program(graphs, {name: part.signature for name, part in parts.items()})


BACKEND = Eager()


def _graph(name: str, part: StoredGraph, sites: Mapping[str, Site], plans: Mapping[str, SitePlan]) -> Graph:
    shapes = {key: dict.fromkeys(axes, Dim.AUTO) for key, axes in part.program.dynamic.items()}
    with torch.no_grad():
        exported = torch.export.export(part.program, (), part.program.examples, dynamic_shapes=shapes)
    own = {slot.site for slot in part.slots.values()}
    planned = {path: plan for path, plan in plans.items() if path in own}
    graph = Graph(name, exported, sites, planned, level=Level.EXPANDED, slots=dict(part.slots))
    graph.extra_outputs = list(part.signature.extra)
    return graph


def _described(signature: CallSignature, slots: Mapping[str, Any]) -> dict[str, Any]:
    return {"signature": signature.to_json(), "slots": [slot_to_json(slot) for slot in slots.values()]}


def _parts(stored: Stored, files: Files, file: TensorFile) -> dict[str, StoredGraph]:
    entries: Any = stored["graphs"]
    nodes = json.loads(files[_PROGRAM].read())
    return {
        name: StoredGraph(
            StoredProgram(nodes[name], file),
            CallSignature.from_json(entry["signature"]),
            {slot.name: slot for slot in map(slot_from_json, entry["slots"])},
        )
        for name, entry in entries.items()
    }
